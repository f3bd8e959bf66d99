"""Wheel and sdist: what they hold, and that what they install imports from any folder, with and without Triton; ceilings of bench and model."""

import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

from step_kernels.extras import import_extra

ROOT = Path(__file__).resolve().parents[1]
# As `python -c "import step_kernels, step_kernels.model"` in each folder, but PyTorch, which takes seconds, is imported once, before the forks.
IMPORT = """
import os, sys
import torch
assert "triton" not in sys.modules
for folder, site, triton in zip(*[iter(sys.argv[1:])] * 3):
    child = os.fork()
    if not child:
        os.chdir(folder)  # sys.path[0] is "": the current folder
        sys.path.insert(1, site)
        if triton == "without":
            sys.modules["triton"] = None
        import step_kernels, step_kernels.model
        print(step_kernels.__file__, step_kernels.model.__file__, sep=" and ", flush=True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, folder
"""


def run(*command: str, cwd: Path) -> str:
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of the files that git would commit, so that a build leaves nothing behind in this checkout."""
    copy = tmp_path_factory.mktemp("checkout")
    listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT)
    for name in filter(None, listed.split("\0")):
        if not (ROOT / name).exists():
            continue
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_symlink():
            (copy / name).symlink_to(os.readlink(ROOT / name))
        else:
            (copy / name).write_bytes((ROOT / name).read_bytes())
    return copy


@pytest.fixture(scope="module")
def built(checkout, tmp_path_factory) -> dict[str, Path]:
    """The sdist, and the wheel built from that sdist."""
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(checkout), cwd=out)
    return {"sdist": next(out.glob("*.tar.gz")), "wheel": next(out.glob("*.whl"))}


def test_the_wheel_holds_the_package_its_command_line_and_nothing_else(built):
    names = zipfile.ZipFile(built["wheel"]).namelist()
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"step_kernels", "step_kernels_cli.py"}
    expected = {str(path.relative_to(ROOT)) for path in (ROOT / "step_kernels").rglob("*.py")}
    expected |= {f"step_kernels/{path.relative_to(ROOT)}" for path in (ROOT / "model").rglob("*.py")}
    assert expected | {"step_kernels/py.typed"} == {name for name in names if name.startswith("step_kernels/")}
    assert any(name.endswith("licenses/LICENSE") for name in names)
    (metadata,) = (name for name in names if name.endswith("/METADATA"))
    page = zipfile.ZipFile(built["wheel"]).read(metadata).decode()
    assert "[ops]" not in page and ".png" not in page, "files that no index has"
    assert "Install · ops · models" in page


def test_the_sdist_holds_what_a_rebuild_and_the_tests_need(built):
    with tarfile.open(built["sdist"]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for needed in (
        "setup.py",
        "pyproject.toml",
        "constraints.txt",
        "README.md",
        "LICENSE",
        "CITATION.cff",
        "CHANGELOG.md",
        "CONTRIBUTING.md",
        "mkdocs.yml",
    ):
        assert needed in names
    assert {
        "step_kernels/model/vit.py",
        "step_kernels/layout.py",
        "tests/test_packaging.py",
        "bench/__main__.py",
        "docs/ops.md",
    } <= names
    assert not [name for name in names if name.startswith("model/")], "the model layer twice"


@pytest.fixture(scope="module")
def editable(checkout, tmp_path_factory) -> str:
    """The Python of an environment of its own that holds an editable install, and by a path this one's packages (torch)."""
    root = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", str(root), cwd=root)
    places = {"base": str(root), "platbase": str(root)}
    site = Path(sysconfig.get_path("purelib", "venv", places))
    install = ["-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--target"]
    run(sys.executable, *install, str(site), "-e", str(checkout), cwd=root)
    (site / "this_environment.pth").write_text(sysconfig.get_path("purelib"))
    return str(Path(sysconfig.get_path("scripts", "venv", places)) / "python")


def test_whatever_is_installed_imports_from_anywhere(built, editable, checkout, tmp_path):
    """An unpacked sdist and wheel, which is all that its installation is, an editable install, and a checkout as it is, with and without Triton."""
    with tarfile.open(built["sdist"]) as archive:
        safely = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # from Python 3.11.4 on
        archive.extractall(tmp_path / "sdist", **safely)
    zipfile.ZipFile(built["wheel"]).extractall(tmp_path / "wheel")
    (sdist,), wheel = (tmp_path / "sdist").iterdir(), tmp_path / "wheel"
    runs = [
        (sdist, "", "with", sdist),
        (tmp_path, wheel, "with", wheel),
        (tmp_path, wheel, "without", wheel),
        (checkout, wheel, "with", checkout),
        (tmp_path, "", "with", checkout),
        (checkout, "", "without", checkout),
    ]
    words = [str(word) for *words, _ in runs for word in words]
    found = run(editable, "-c", IMPORT, *words, cwd=tmp_path).splitlines()
    for files, (*_, root) in zip(found, runs, strict=True):
        package, model = files.split(" and ")
        assert Path(package).is_relative_to(root) and Path(model).is_relative_to(root)


USER = """
from step_kernels import SupertokenLayout, merge_patches
from step_kernels.model import VariancePolicy, load_segmenter

layout = SupertokenLayout.uniform(1, (4, 4))
reveal_type(layout.grid)
reveal_type(VariancePolicy(0.1).sides)
reveal_type(load_segmenter("folder", num_heads=3))
layout.nothing
merge_patches(None, layout, 16, resample="bicubic")
"""


def test_type_checkers_see_an_editable_install(editable, tmp_path):
    pytest.importorskip("mypy", reason="mypy comes with the extra dev")
    (tmp_path / "user.py").write_text(USER)
    # PyTorch's own types would take half a minute.
    (tmp_path / "mypy.ini").write_text("[mypy]\n[mypy-torch.*,numpy.*,triton.*]\nfollow_imports = skip\n")
    command = [sys.executable, "-m", "mypy", "--python-executable", editable, "user.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert [line.split(": ", 1)[1] for line in done.stdout.splitlines()[:-1]] == [
        'note: Revealed type is "tuple[int, int]"',
        'note: Revealed type is "tuple[int, ...]"',
        'note: Revealed type is "step_kernels.model.segmenter.StepSegmenter"',
        'error: "SupertokenLayout" has no attribute "nothing"  [attr-defined]',
        'error: Argument "resample" to "merge_patches" has incompatible type "Literal[\'bicubic\']"; expected '
        "\"Literal['area', 'bilinear']\"  [arg-type]",
    ], done.stdout + done.stderr


@pytest.mark.parametrize("version", ["2.13.0+cpu", "2.13.0"])
def test_a_torchvision_of_another_build_is_named_with_what_mends_it(tmp_path, monkeypatch, version):
    (tmp_path / "half_installed.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    (tmp_path / "buggy.py").write_text("raise RuntimeError('a bug')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(torch, "__version__", version)
    with pytest.raises(ImportError, match=r"built for another PyTorch than 2\.13\.0.*torchvision::nms") as raised:
        import_extra("half_installed", "timm", "timm")
    index = " --index-url https://download.pytorch.org/whl/cpu" if "+" in version else ""
    assert str(raised.value).endswith(f"&& pip install torchvision torch=={version}{index}")
    with pytest.raises(RuntimeError, match="a bug"):
        import_extra("buggy", "timm", "timm")


@pytest.mark.parametrize(
    ("folder", "most", "apart"), [("bench", 4000, ()), ("model", 5210, ("cli", "train", "from_transformers"))]
)
def test_bench_and_model_are_small_enough_to_be_read(folder: str, most: int, apart: tuple[str, ...]):
    """The model layer without its commands and training, which run it and which it does not know, and without one library's names."""
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in (ROOT / folder).rglob("*.py")}
    assert sum(count for path, count in lines.items() if path.parent.name not in apart) <= most
    assert {path.relative_to(ROOT): count for path, count in lines.items() if count > 300} == {}
