# Two commands do everything on a machine with Python, a C++ compiler and make: `make demo` and `make test`.
# Each makes .venv when it is missing and brings it up to date when dependencies or kernels changed.

PYTHON ?= $(shell python3.11 -c 'import sys; print(sys.executable)' 2>/dev/null || echo python3)
# Extra flags for pip, for example PIP_FLAGS="--extra-index-url https://download.pytorch.org/whl/cpu", which spares the
# gigabytes of CUDA libraries that PyPI's torch brings along.
PIP_FLAGS ?=
BENCH_FLAGS ?=
ZOO_FLAGS ?=
# How long `make fuzz` tries random problems, and how many changed files it loads.
FUZZ_SECONDS ?= 300
FUZZ_FILES ?= 10000
# The Python that runs the GPU tests, .venv's by default.
ESCORT_PYTHON ?=

VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt $(PIP_FLAGS)
# The build tools come from .venv, pinned like everything else, and object files are kept under build/.
BUILD := --no-build-isolation --config-settings=build-dir
KERNELS := $(wildcard src/escort/kernels/*.cpp src/escort/kernels/cpu/*.?pp src/escort/kernels/cuda/* src/escort/cuda/*.cpp)
SOURCES := $(shell find src -name '*.py')
# Several processes, torch with one thread in each: small tests gain nothing from more threads.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not gpu" --numprocesses 2

.DEFAULT_GOAL := help
.PHONY: help demo test smoke lint lock format test-asan test-tsan test-arm test-integrations fuzz test-gpu test-stress test-sanitizer wheel wheels wheel-test bench zoo docs hooks clean

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# Editable: a changed .py or .cu file takes effect at once, only the files named here call for another install.
# Torch is PyPI's with CUDA, or the build for CPUs that PIP_FLAGS leads to; what it brings itself comes last. All else is
# of the files whose hashes requirements.lock has.
$(VENV)/.installed: pyproject.toml requirements.lock CMakeLists.txt $(filter-out %.cu %.cuh,$(KERNELS))
	@echo "Setting up $(VENV): a few minutes the first time"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) --no-deps torch
	$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes --no-deps -r requirements.lock
	$(INSTALL) torch
	$(INSTALL) --no-deps $(BUILD)=build/release --editable .
	$(BIN)/pip check
	@touch $@

lock:  ## Look up the hashes of the versions in constraints.txt, for requirements.lock
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) uv
	$(BIN)/uv pip compile --quiet --no-deps --no-annotate --generate-hashes --python-version 3.11.2 \
		--custom-compile-command "make lock" --output-file requirements.lock constraints.txt

demo: $(VENV)/.installed  ## Train, prune, convert and time a small CNN; results in out/demo
	$(BIN)/escort demo --out out/demo

# pytest runs last, so that its summary closes the output.
test: lint test-asan test-tsan  ## Lint, type check and run all tests, the kernels under sanitizers too
	$(PYTEST)

smoke: lint  ## In a minute: lint, type check, every CPU method on the case table, one network converted, saved and loaded
	$(PYTEST) -q tests/test_house.py tests/test_cases.py::test_case tests/artifact/test_save_load.py

lint: $(VENV)/.installed  ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(KERNELS)
	$(BIN)/mypy

format: $(VENV)/.installed  ## Format all sources and mend what ruff can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(KERNELS)

# A second copy of the package, its kernels instrumented. pip keeps the object files, so a changed .py costs seconds.
build/asan/.installed: $(VENV)/.installed $(SOURCES)
	$(INSTALL) --no-deps $(BUILD)=build/asan/cmake --config-settings=cmake.define.ESCORT_SANITIZE=ON \
		--config-settings=install.strip=false --upgrade --target build/asan/site .
	@touch $@

# -S keeps the editable install's import hook out, which would lead `import escort` past PYTHONPATH to the plain build.
# The sanitizer must be the first library in the process, and it needs the C++ runtime beside it to see exceptions.
# Python and torch never free some of their memory: leaks are not looked for. PYTHONMALLOC=malloc shows it every object,
# and pytest must neither catch the crash (faulthandler) nor swallow the report (captured file descriptors).
SANITIZED = LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0 PYTHONMALLOC=malloc \
	PYTHONPATH="build/asan/site:$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" \
	$(BIN)/python -S
test-asan: build/asan/.installed  ## Run the kernel cases under the address and undefined-behaviour sanitizers
	$(SANITIZED) -m pytest -p no:faulthandler --capture=sys tests/test_cases.py

build/tsan/threads: tests/threads.cpp $(foreach name,threads program,$(addprefix src/escort/kernels/cpu/$(name).,cpp hpp))
	mkdir -p $(@D)
	$(CXX) -std=c++20 -O1 -g -Wall -Wextra -fsanitize=thread -DESCORT_CORES=8 -Isrc/escort/kernels/cpu \
		$(filter %.cpp,$^) -o $@

# setarch: this sanitizer does not find its way where addresses are random in many bits.
test-tsan: build/tsan/threads  ## Run the threads of the CPU kernels under the thread sanitizer
	setarch -R $<

# No processor of that kind is needed: a cross compiler and an emulator, which knows what is right and not what is fast.
# On such a processor: make test-arm ARM_CXX=g++ ARM_RUN=
ARM_CXX ?= aarch64-linux-gnu-g++
ARM_RUN ?= qemu-aarch64 -L /usr/aarch64-linux-gnu
ARM_FLAGS := -std=c++20 -O3 -ffp-contract=fast -fno-math-errno -fopenmp -Wall -Wextra -DESCORT_ISA=neon -DESCORT_HAVE_NEON
ARM_OBJECTS := $(patsubst %,build/arm/%.o,channel_swaps depthwise direct lines max_pool isas layers ops program threads)
NEEDED = command -v $(1) >/dev/null || { echo "make test-arm needs $(1): apt-get install $(2)" >&2; exit 1; }

build/arm/%.o: src/escort/kernels/cpu/%.cpp $(filter %.hpp,$(KERNELS))
	@$(call NEEDED,$(ARM_CXX),g++-aarch64-linux-gnu)
	@mkdir -p $(@D)
	$(ARM_CXX) $(ARM_FLAGS) -c $< -o $@

build/arm/driver: tests/arm/driver.cpp $(ARM_OBJECTS)
	$(ARM_CXX) $(ARM_FLAGS) -Isrc/escort/kernels/cpu $^ -o $@

test-arm: $(VENV)/.installed build/arm/driver  ## Run the kernel cases on an AArch64 processor that is emulated (not part of `make test`)
	@$(if $(ARM_RUN),$(call NEEDED,$(firstword $(ARM_RUN)),qemu-user))
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.arm.dump build/arm/runs
	OMP_WAIT_POLICY=passive $(ARM_RUN) build/arm/driver build/arm/runs/*.runs

fuzz: build/asan/.installed  ## Under the sanitizers: random problems (FUZZ_SECONDS=300), changed files (FUZZ_FILES=10000)
	$(SANITIZED) -m tests.fuzz.problems --seconds $(FUZZ_SECONDS)
	$(SANITIZED) -m tests.fuzz.files --count $(FUZZ_FILES)

# Several processes share the GPU, as most of the time goes into compiling kernels and into references.
TEST_ON_GPU = $(or $(ESCORT_PYTHON),$(BIN)/python) -m pytest -m "gpu and not stress" --numprocesses 8
# On a machine that brings its own Python with torch, pytest, pytest-xdist and hypothesis, and no network:
#   python3 -m pip install --no-build-isolation --no-deps . && make test-gpu ESCORT_PYTHON=python3
test-gpu: $(if $(ESCORT_PYTHON),,$(VENV)/.installed)  ## Run the tests that need a GPU
	@$(or $(ESCORT_PYTHON),$(BIN)/python) -c 'import sys, torch; sys.exit(not torch.cuda.is_available() and "torch sees no GPU")'
	$(TEST_ON_GPU)

test-stress: $(if $(ESCORT_PYTHON),,$(VENV)/.installed)  ## On a GPU that nobody else uses: ten thousand calls, many threads
	$(or $(ESCORT_PYTHON),$(BIN)/python) -m pytest -m stress

# Torch's allocator would hide an access beyond a tensor inside its blocks, so it is off. Libraries ask the driver for what
# it lacks and go on: calls that fail are not reported. initcheck must see torch's own kernels write what ours read; what the
# copy engine writes by descriptors it does not see, as sparse_tc does in channels_last but for floats.
# racecheck does not follow a lane that arrives at a barrier for its whole warp: it gets kernels of `direct` whose
# barriers every lane joins, as direct.cu says of SIGNALS, and no others.
SANITIZER = PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --target-processes all --report-api-errors no \
	--error-exitcode 1
CASES = test_case or test_every or test_any_batch or test_pools
WITH_CASES = $(patsubst %,tests/test_%.py,direct_cuda generated sparse_tc max_pool depthwise_cuda depthwise_tc stem gemv planes)
CHECKED = direct generated sparse_tc max_pool depthwise stem gemv average_pool concat resize
test-sanitizer:  ## Run the kernel cases on a GPU under compute-sanitizer, which must be on the PATH
	@command -v compute-sanitizer >/dev/null || { echo "make test-sanitizer needs compute-sanitizer on the PATH, which" \
		"comes with the CUDA toolkit" >&2; exit 1; }
	$(SANITIZER) --tool memcheck $(addprefix --kernel-name kns=,$(CHECKED)) \
		$(TEST_ON_GPU) -q -k "$(CASES)" $(WITH_CASES)
	ESCORT_EVERY_LANE=1 $(SANITIZER) --tool racecheck --kernel-name kns=direct \
		$(TEST_ON_GPU) -q -k "$(CASES)" tests/test_direct_cuda.py
	$(SANITIZER) --tool initcheck $(TEST_ON_GPU) -q -k "($(CASES)) and (not last or tf32)" $(WITH_CASES)

# What pip installs without a compiler (shipping/wheels.py). SHIP=1 compiles kernels of common layers into the wheel, some
# thirty megabytes; else users' machines compile all.
SHIPPED := $(CURDIR)/build/shipping/shipped.kernels
WHEEL_PYTHONS ?= $(PYTHON)
WHEEL_ARCHS ?= $(shell uname -m)
wheel: $(VENV)/.installed  ## Build sources and a wheel into dist/; SHIP=1 puts compiled kernels for GPUs in, which takes minutes
	$(if $(SHIP),$(BIN)/python -m shipping $(SHIPPED))
	$(BIN)/python -m shipping.wheels $(WHEEL_PYTHONS:%=--python %) $(WHEEL_ARCHS:%=--arch %) \
		$(if $(SHIP),--kernels $(SHIPPED))

# All that is uploaded. It takes Python 3.11 and 3.12, and GCC's cross compiler for AArch64.
wheels: WHEEL_PYTHONS = python3.11 python3.12
wheels: WHEEL_ARCHS = x86_64 aarch64
wheels: wheel  ## Build the wheels for all versions of Python and both kinds of processors

wheel-test: wheel  ## Install the wheel into an empty environment and convert a model there; WHEEL_PYTHONS=python3.12
	rm -rf build/wheel-test
	$(WHEEL_PYTHONS) -m venv build/wheel-test
	build/wheel-test/bin/pip install --quiet --disable-pip-version-check -c constraints.txt $(PIP_FLAGS) dist/*.whl
	build/wheel-test/bin/python -I tests/check_wheel.py

bench: $(VENV)/.installed  ## Time the paper's layers and ResNet-50 on this machine
	$(BIN)/python -m benchmarks layers $(BENCH_FLAGS)
	$(BIN)/python -m benchmarks networks resnet50 --sparsity 0.9 --batch 1,8 --against onnxruntime $(BENCH_FLAGS)
	$(BIN)/python -m benchmarks networks resnet50 --sparsity 0.95 --batch 1,8 --against onnxruntime $(BENCH_FLAGS)

# An environment of its own, with the torch that the libraries need. Theirs is not in constraints.txt: it is never in CI.
ZOO := build/zoo
ZOO_INSTALL := $(ZOO)/venv/bin/pip install --quiet --disable-pip-version-check $(PIP_FLAGS)
$(ZOO)/.installed: benchmarks/zoo/requirements.txt pyproject.toml CMakeLists.txt $(filter-out %.cu %.cuh,$(KERNELS))
	test -x $(ZOO)/venv/bin/python || $(PYTHON) -m venv $(ZOO)/venv
	$(ZOO_INSTALL) scikit-build-core nanobind cmake ninja -r benchmarks/zoo/requirements.txt
	$(ZOO_INSTALL) $(BUILD)=$(ZOO)/cmake --editable .
	@touch $@

zoo: $(ZOO)/.installed  ## Convert some hundred networks of torchvision, timm and others; results in benchmarks/results/zoo.json
	$(ZOO)/venv/bin/python -m benchmarks zoo $(ZOO_FLAGS)

# Other libraries, each group of them in an environment of its own. They are not in constraints.txt: never in CI.
# tests/integrations/GROUP has the libraries in requirements.txt, pinned, and tests in checks.py, which plain pytest
# does not collect.
GROUPS ?= $(notdir $(patsubst %/,%,$(dir $(wildcard tests/integrations/*/requirements.txt))))
INTEGRATIONS := build/integrations
$(INTEGRATIONS)/%/.installed: tests/integrations/%/requirements.txt pyproject.toml CMakeLists.txt $(filter-out %.cu %.cuh,$(KERNELS))
	test -x $(@D)/venv/bin/python || $(PYTHON) -m venv $(@D)/venv
	$(@D)/venv/bin/pip install --quiet --disable-pip-version-check $(PIP_FLAGS) scikit-build-core nanobind cmake ninja -r $<
	$(@D)/venv/bin/pip install --quiet --disable-pip-version-check $(PIP_FLAGS) $(BUILD)=$(@D)/cmake --editable .
	@touch $@

test-integrations: $(GROUPS:%=$(INTEGRATIONS)/%/.installed)  ## Try other libraries, each group in its own environment; GROUPS="onnx pruners"
	$(foreach group,$(GROUPS),$(INTEGRATIONS)/$(group)/venv/bin/python -m pytest tests/integrations/$(group)/checks.py &&) true

docs: $(VENV)/.installed  ## Build the documentation's pages into build/docs
	rm -rf build/docs
	$(BIN)/sphinx-build --quiet --fail-on-warning --keep-going -j 2 -c docs . build/docs
	cp build/docs/README.html build/docs/index.html

hooks: $(VENV)/.installed  ## Check style and types before each commit
	$(BIN)/pre-commit install

clean:  ## Remove everything that make made, .venv too
	rm -rf $(VENV) build dist out .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
