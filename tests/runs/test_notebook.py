"""An error of the kit in a notebook is its sentence; any other is shown as ever."""

import pytest
from IPython.core.interactiveshell import InteractiveShell

from recnb.runs import notebook


@pytest.fixture
def shell():
    shell = InteractiveShell.instance()
    notebook.load_ipython_extension(shell)
    yield shell
    shell.set_custom_exc((), None)
    InteractiveShell.clear_instance()


def test_an_error_of_the_kit_is_one_line(shell, capsys, monkeypatch):
    published = []
    monkeypatch.setattr(shell.display_pub, "publish", published.append)
    result = shell.run_cell("from recnb.registry import ConfigError\nraise ConfigError('Arch.Haed: <no such key>')")
    assert capsys.readouterr().out.strip() == "ConfigError: Arch.Haed: <no such key>"
    assert not result.success  # papermill stops here, too
    assert "<details>" in published[0]["text/html"] and "&lt;no such key&gt;" in published[0]["text/html"]


def test_another_error_has_its_traceback(shell, capsys):
    assert not shell.run_cell("1 / 0").success
    printed = capsys.readouterr().out
    assert "Traceback" in printed and "ZeroDivisionError" in printed
