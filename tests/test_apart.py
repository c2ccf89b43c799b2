"""Parts and a training keep to their device: the quick ones of the tests for a GPU, on a device that is none."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT
from torch.utils import backend_registration

FILES = ("models/test_model.py", "models/test_heads.py", "losses/test_losses.py", "training/test_gpu.py")


@pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this version of torch takes no backend in Python",
)
def test_parts_and_a_training_keep_to_their_device():
    words = ["-m", "gpu", "--apart", "-k", "every or original or mix or plain or bfloat16 or memory"]
    files = [ROOT / "tests" / file for file in FILES]
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST", "COV"))}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *words, "-p", "no:cacheprovider", *files],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout
