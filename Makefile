# make demo   train on drawn images and leave an executed notebook (a few minutes on two CPU cores)
# make test   the default test suite        make lab   JupyterLab on the notebooks
# make test-browser   the galleries in a real Chromium (installed by apt where that may be)
# make PYTHON=python3.12 demo               to use another Python than python3 (3.10 or newer)
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-browser lab pictures clean

demo: .venv/installed
	@rm -rf runs/demo && mkdir -p runs/demo
	@# One thread: the demo's network is so small that more would spend their time waiting for each other.
	OMP_NUM_THREADS=1 $(BIN)/papermill notebooks/02_train.ipynb runs/demo/train.ipynb -k python3 -l python \
	    -p config configs/demo.yaml -p run_dir runs/demo --autosave-cell-every 30
	@$(BIN)/python -c "import json; m = json.load(open('runs/demo/metrics.json')); b = m['before']; \
	    print('\n'.join(f'{k:>8}  {b[k]:.3f} -> {m[k]:.3f}' for k in b))"
	@echo "executed notebook: runs/demo/train.ipynb    gallery: runs/demo/gallery.html"

test: .venv/installed
	$(BIN)/python -m pytest

test-browser: .venv/installed
	@command -v chromium >/dev/null || { test "$$(id -u)" = 0 && command -v apt-get >/dev/null \
	    && apt-get update -qq && apt-get install -y -qq chromium >/dev/null; } \
	    || echo "no chromium, and it cannot be installed here: install Debian's package chromium"
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[browser]'
	$(BIN)/python -m pytest -m browser

lab: .venv/installed
	$(BIN)/jupyter lab notebooks

# Reinstalled only when what is asked for changes.
.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10))" || { echo "recnb needs Python 3.10 or newer"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[lab,test,export]'
	@touch $@

pictures: .venv/installed  # those in the README, after make demo
	$(BIN)/python scripts/gallery_picture.py runs/demo docs/gallery.png
	$(BIN)/python scripts/evaluation_picture.py runs/demo docs/evaluation.png

clean:
	rm -rf .venv runs data/demo
