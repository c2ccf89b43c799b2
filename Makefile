# make demo    train on drawn images and leave an executed notebook (a few minutes on two CPU cores)
# make test    the default test suite        make lab     JupyterLab on the notebooks
# make test-browser   the galleries in a real Chromium (installed by apt where that may be)
# make docs    the documentation as a site   make lint types format wheel     see CONTRIBUTING.md
# make PYTHON=python3.12 demo                to use another Python than python3 (3.10 or newer)
PYTHON ?= python3
BIN := .venv/bin
EXTRAS := lab,test,export
UV := $(shell command -v uv)

# uv takes the CPU build of torch where there is no GPU; where its list of builds cannot be reached, the index's own build.
ifdef UV
VENV := uv venv -q --seed --python $(PYTHON) .venv
PIP := uv pip install -q --python $(BIN)/python -c constraints.txt
install = $(PIP) --torch-backend auto -e '.[$(1)]' 2>/dev/null || $(PIP) -e '.[$(1)]'
else
VENV := $(PYTHON) -m venv .venv
install = $(BIN)/python -m pip install -q -c constraints.txt -e '.[$(1)]'
endif

.PHONY: demo test test-browser lab pictures docs lint types format wheel clean

demo: .venv/installed
	@rm -rf runs/demo
	@# One thread: the demo's network is so small that more would spend their time waiting for each other.
	OMP_NUM_THREADS=1 $(BIN)/recnb run 02_train -p config configs/demo.yaml -p run_dir runs/demo
	@$(BIN)/python -c "import json; m = json.load(open('runs/demo/metrics.json')); b = m['before']; \
	    print('\n'.join(f'{k:>8}  {b[k]:.3f} -> {m[k]:.3f}' for k in b))"
	@echo "executed notebook: runs/demo/train.ipynb    gallery: runs/demo/gallery.html"

test: .venv/installed
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-browser: .venv/installed
	@command -v chromium >/dev/null || { test "$$(id -u)" = 0 && command -v apt-get >/dev/null \
	    && apt-get update -qq && apt-get install -y -qq chromium >/dev/null; } \
	    || echo "no chromium, and it cannot be installed here: install Debian's package chromium"
	$(call install,browser)
	$(BIN)/python -m pytest -m browser

lab: .venv/installed
	$(BIN)/jupyter lab notebooks

# Reinstalled only when what is asked for changes.
.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10))" || { echo "recnb needs Python 3.10 or newer"; exit 1; }
	test -x $(BIN)/python || $(VENV) || { rm -rf .venv; exit 1; }
	$(call install,$(EXTRAS))
	@touch $@

pictures: .venv/installed  # those in the README, after make demo
	$(BIN)/python scripts/gallery_picture.py runs/demo docs/gallery.png
	$(BIN)/python scripts/evaluation_picture.py runs/demo docs/evaluation.png

docs: .venv/installed runs/demo/metrics.json
	$(call install,docs)
	$(BIN)/python docs/build.py

runs/demo/metrics.json:
	$(MAKE) demo

# What CONTRIBUTING.md asks for before a commit.
lint: .venv/dev
	$(BIN)/pre-commit run --all-files

types: .venv/dev
	$(BIN)/mypy

format: .venv/dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

wheel: .venv/dev
	$(BIN)/python -m build

.venv/dev: .venv/installed
	$(call install,dev)
	@touch $@

clean:
	rm -rf .venv runs data/demo dist docs/_build
