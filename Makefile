# finemill: `make help` lists the targets.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# uv installs in seconds what takes pip minutes; both read the same constraints.
INSTALL := $(if $(shell command -v uv),uv pip install --quiet --compile-bytecode --python $(BIN)/python,$(BIN)/python -m pip install --quiet)

# The program that `make test-cluster` asks for a cluster when KUBECONFIG names none, and how `make images` builds:
# BASE is a Debian with Python 3.11, by digest; images/README.md says how to get one.
FINEMILL_CLUSTER ?=
BASE ?=
REGISTRY ?= localhost
BUILD_FLAGS ?=
VERSION := $(shell sed -n 's/^__version__ = "\(.*\)"/\1/p' src/finemill/__init__.py)

.DEFAULT_GOAL := help
WORKERS ?= 2
FAULTS ?= 1
HELM_VERSION := 3.19.5

.PHONY: help install helm run test test-cluster test-faults images check format lint types components golden chart lock clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*##/\1\t/p' $(MAKEFILE_LIST) | expand -t 14

$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (PyTorch alone is about 3 GB on the first run)"
	@$(INSTALL) -c constraints.txt -e '.[all,dev]'
	@touch $@

install: $(STAMP)  ## install finemill and its tools into .venv

helm: $(STAMP)  ## helm for the chart's tests, if there is none: built from its Go module, which takes minutes once
	@command -v helm >/dev/null || test -x $(BIN)/helm || GOBIN=$(abspath $(BIN)) go install helm.sh/helm/v3/cmd/helm@v$(HELM_VERSION)

run: $(STAMP)  ## raw rows to a promoted model, with the default config
	@$(BIN)/finemill run finetune

test: $(STAMP)  ## run the tests, in WORKERS processes
	@$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test-cluster: $(STAMP)  ## the tests that need a Kubernetes cluster with Argo Workflows
	@FINEMILL_CLUSTER=$(FINEMILL_CLUSTER) $(BIN)/python -m pytest -m cluster tests/cluster

test-faults: $(STAMP)  ## half an hour of kills, damaged S3, racing promotions and strange inputs; FAULTS=0.1 tries a tenth
	@FINEMILL_FAULTS=$(FAULTS) $(BIN)/python -m pytest -m faults -n $(WORKERS) --dist worksteal tests/faults

images: $(STAMP)  ## build both images with buildah on BASE, name@sha256:...; REGISTRY and BUILD_FLAGS are yours to set
	@case "$(BASE)" in *@sha256:*|localhost/*) ;; *) echo "make images: BASE '$(BASE)' is no image by digest: images/README.md"; exit 2;; esac
	@for role in cpu train; do \
		buildah bud --layers $(BUILD_FLAGS) --build-arg BASE=$(BASE) --build-arg VERSION=$(VERSION) \
			--build-arg GIT_SHA=$$(git rev-parse HEAD) -t $(REGISTRY)/finemill-$$role:$(VERSION) -f images/$$role/Containerfile . || exit 1; \
	done

check: format lint types test  ## everything CI runs

format: $(STAMP)  ## check the formatting
	@$(BIN)/ruff format --check .

lint: $(STAMP)  ## lint
	@$(BIN)/ruff check .

types: $(STAMP)  ## check the types, strictly
	@$(BIN)/mypy

components: $(STAMP)  ## write KFP components and pipelines' configurations anew from the catalogue and the graphs
	@$(BIN)/python -m finemill.runtime.kfp_component
	@$(BIN)/python -m finemill.pipelines.config_source

golden: $(STAMP)  ## write the compiled pipelines anew that tests compare with; read the difference
	@for name in finetune align retrain export; do for engine in kfp argo; do \
		$(BIN)/finemill compile $$name --engine $$engine --store s3://bucket/prefix -o tests/pipelines/golden/$$name-$$engine.yaml; \
	done; done
	@# kfp's comments repeat the parameters in an order that changes from run to run.
	@sed -i '/^#/d' tests/pipelines/golden/*-kfp.yaml

chart: $(STAMP)  ## write the chart's pipelines, schema and README anew from their sources
	@$(BIN)/python charts/generate.py

HASHED := uv pip compile -q --generate-hashes --python-version 3.11 --python-platform x86_64-manylinux_2_28 \
	--no-annotate --no-header --no-emit-index-url

lock: $(STAMP)  ## resolve constraints.txt anew, and what images are made of, with hashes
	@uv pip compile pyproject.toml --all-extras --universal --python-version 3.11 \
		--no-annotate --no-header --no-emit-index-url --no-emit-find-links --no-strip-markers --upgrade -q -o constraints.txt
	@for role in cpu train; do \
		$(HASHED) -c constraints.txt images/$$role/requirements.in >images/$$role/requirements.txt && \
		echo kfp | $(HASHED) -c constraints.txt --no-deps - >>images/$$role/requirements.txt || exit 1; \
	done
	@echo cyclonedx-bom==7.5.0 | $(HASHED) - >images/tools.txt

clean:  ## remove what the targets made, but not the store
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache
