"""Which floor runs an op, what is refused, what is said about it."""

import os
import subprocess
import sys
import warnings

import pytest
import torch

import step_kernels as sk
from step_kernels import backend

GPU = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def fresh_backend():
    """Each test starts with nothing warned of and no cached answer."""
    backend._warned.clear()
    backend.why_no_triton_on.cache_clear()
    with sk.use_backend("auto"):
        yield
    backend.why_no_triton_on.cache_clear()


@pytest.fixture
def gpu(monkeypatch):
    """An NVIDIA GPU of some capability."""
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    return lambda capability: monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)


IMPORTS = """
import sys
import torch

tried = []

class NoTriton:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            tried.append(name)
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, NoTriton())
import os
try:
    import step_kernels
except ValueError as error:
    print(error)
for name in [name for name in sys.modules if name.startswith("step_kernels")]:
    del sys.modules[name]
os.environ["STEP_KERNELS_BACKEND"] = "reference"
import step_kernels, step_kernels.model
print(step_kernels.current_backend())
print(tried, [name for name in ("triton", "torch.utils.flop_counter") if name in sys.modules])
"""


@pytest.fixture(scope="module")
def imports() -> list[str]:
    """What a process prints that has no Triton and imports the package, first under a wrong name of a backend."""
    words, environment = [sys.executable, "-c", IMPORTS], os.environ | {"STEP_KERNELS_BACKEND": "fast"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_auto_on_the_cpu_is_the_reference_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert sk.selected_backend("merge_tokens", torch.device("cpu")) == "reference"


def test_auto_warns_once_of_a_reason(gpu):
    gpu((7, 5))
    with pytest.warns(sk.UnusedAcceleratorWarning, match="merge_tokens runs its PyTorch reference on cuda:0: compute"):
        assert sk.selected_backend("merge_tokens", GPU) == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert sk.selected_backend("merge_tokens", GPU) == "reference"
        assert sk.selected_backend("scatter_back", GPU) == "reference"


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (9, 0), (12, 0)])
def test_auto_takes_triton_from_capability_8_0_on(gpu, capability):
    gpu(capability)
    assert sk.selected_backend("merge_tokens", GPU) == "triton"


def test_auto_names_an_old_gpu(gpu):
    gpu((7, 5))
    with pytest.warns(sk.UnusedAcceleratorWarning, match=r"compute capability 7\.5 of Some GPU is below 8\.0"):
        assert sk.selected_backend("merge_tokens", GPU) == "reference"


def test_auto_names_rocm(gpu, monkeypatch):
    gpu((9, 0))
    monkeypatch.setattr(torch.version, "hip", "6.4")
    with pytest.warns(sk.UnusedAcceleratorWarning, match="ROCm"):
        assert sk.selected_backend("merge_tokens", GPU) == "reference"


def test_auto_names_other_accelerators(gpu):
    with pytest.warns(sk.UnusedAcceleratorWarning, match="'mps'"):
        assert sk.selected_backend("merge_tokens", torch.device("mps")) == "reference"


def test_auto_names_a_missing_triton(gpu, monkeypatch):
    gpu((9, 0))
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: None)
    with pytest.warns(sk.UnusedAcceleratorWarning, match="Triton is not installed"):
        assert sk.selected_backend("merge_tokens", GPU) == "reference"


def test_forced_triton_never_falls_back():
    layout = sk.SupertokenLayout.uniform(1, (2, 2))
    with sk.use_backend("triton"), pytest.raises(RuntimeError, match=r"step_kernels\.merge_tokens cannot run on cpu"):
        sk.merge_tokens(torch.zeros(1, 4, 3), layout)


def test_forced_triton_on_the_cpu_asks_for_the_interpreter(gpu, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with sk.use_backend("triton"), pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
        sk.selected_backend("merge_tokens", torch.device("cpu"))
    backend.why_no_triton_on.cache_clear()
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with sk.use_backend("triton"):
        assert sk.selected_backend("merge_tokens", torch.device("cpu")) == "triton"


def test_float64_takes_the_reference_and_says_so(gpu):
    gpu((9, 0))
    with pytest.warns(sk.UnusedAcceleratorWarning, match="float64 tensors take the reference"):
        assert sk.selected_backend("merge_tokens", GPU, torch.float64) == "reference"
    assert sk.selected_backend("merge_tokens", GPU, torch.float32) == "triton"
    with sk.use_backend("triton"), pytest.raises(RuntimeError, match="compute in float32"):
        sk.selected_backend("merge_tokens", GPU, torch.float64)


@pytest.mark.parametrize("where", ["first", "later", "list"])
def test_a_call_with_a_float64_tensor_anywhere_is_one_of_float64(where):
    half, double = torch.zeros(2, dtype=torch.float16), torch.zeros(2, dtype=torch.float64)
    args = {"first": (double, None, 3), "later": (half, 1, double), "list": ([half, double], 2)}[where]
    assert backend._device_and_dtype_of(args) == (torch.device("cpu"), torch.float64)
    assert backend._device_and_dtype_of((half, torch.tensor(0.5, dtype=torch.float64))) == (torch.device("cpu"), None)


def test_reference_is_the_reference_everywhere(gpu):
    gpu((9, 0))
    with sk.use_backend("reference"), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert sk.selected_backend("merge_tokens", GPU) == "reference"


def test_use_backend_sets_and_restores():
    assert sk.current_backend() == "auto"
    with sk.use_backend("reference"):
        assert sk.current_backend() == "reference"
        with sk.use_backend("auto"):
            assert sk.current_backend() == "auto"
        assert sk.current_backend() == "reference"
    assert sk.current_backend() == "auto"
    sk.use_backend("reference")
    assert sk.current_backend() == "reference"


def test_use_backend_is_restored_by_an_exception():
    with pytest.raises(KeyError), sk.use_backend("reference"):
        raise KeyError
    assert sk.current_backend() == "auto"


@pytest.mark.parametrize("name", ["cuda", "", None, 3])
def test_use_backend_refuses_other_names(name):
    with pytest.raises(ValueError, match="name: expected one of auto, triton, reference, got"):
        sk.use_backend(name)
    assert sk.current_backend() == "auto"


def test_environment_variable_chooses_the_backend(imports):
    assert imports[1] == "reference"


def test_environment_variable_with_nonsense_is_refused_at_import(imports):
    assert "STEP_KERNELS_BACKEND: expected one of auto, triton, reference, got 'fast'" in imports[0]


def test_import_works_without_triton_and_imports_neither_it_nor_the_counter_of_flops(imports):
    assert imports[2] == "[] []"


def test_asking_about_an_op_that_is_not_there():
    with pytest.raises(ValueError, match="op: expected a registered op of step_kernels, got 'nonsense'"):
        sk.selected_backend("nonsense", "cpu")
    assert sk.selected_backend("merge_tokens", "cpu") == "reference"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_does_not_change_the_dtype_that_ops_compute_in(dtype):
    x, weight = torch.randn(5, 8, requires_grad=True), torch.randn(6, 8, requires_grad=True)
    q = torch.randn(5, 2, 8)
    cu_seqlens = torch.tensor([0, 5], dtype=torch.int32)
    plain = sk.ragged_linear(x, weight), sk.ragged_attention(q, q, q, cu_seqlens, 5)
    with torch.autocast("cpu", dtype):
        cast = sk.ragged_linear(x, weight), sk.ragged_attention(q, q, q, cu_seqlens, 5)
        cast[0].sum().backward()
    assert torch.equal(cast[0], plain[0]) and torch.equal(cast[1], plain[1])
    assert x.grad.dtype == torch.float32
