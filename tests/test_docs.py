"""README and docs tell the truth: their code runs, their tables are what is generated, they name every op and variable there is."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import step_kernels
import step_kernels.model
from bench.report import regenerated
from bench.result import FILES, read
from step_kernels.model import train
from step_kernels.model.cli.evaluate import table
from step_kernels.model.cli.tables import Table, as_markdown, runs, tables

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    path.relative_to(ROOT).as_posix(): path for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
}
TEXTS = {name: path.read_text(encoding="utf-8") for name, path in PAGES.items()}
LINKING = TEXTS | {name: (ROOT / name).read_text(encoding="utf-8") for name in ("CONTRIBUTING.md", "CHANGELOG.md")}
RESULTS = [path for path in sorted((ROOT / "bench" / "results").rglob("*.json")) if "latest" not in path.parts]
TABLES = sorted({path for text in TEXTS.values() for path in re.findall(r"<!-- table: (\S+) -->", text)})


def blocks(language: str) -> dict[str, list[str]]:
    """A page's code blocks of this language, of the pages that have any."""
    found = {
        name: re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE) for name, text in TEXTS.items()
    }
    return {name: code for name, code in found.items() if code}


@pytest.mark.parametrize("page", blocks("python"))
def test_code_runs_as_written(page):
    """From top to bottom, as a reader would type it."""
    names, codes = {"__name__": "__main__"}, blocks("python")[page]
    if page == "docs/transformers.md":
        pytest.importorskip("transformers", reason="pip install -e '.[dev]' brings it")
    if any("import timm" in code or "transformers" in code for code in codes):
        from real_timm import timm  # noqa: F401  # so that it imports beside any build of PyTorch
    for code in codes:
        exec(compile(code, page, "exec"), names)
    if page == "README.md":
        assert 0.1 < names["left"] / names["merged"] < 0.9, "its exit halts some tokens, not all"


@pytest.mark.parametrize("page", blocks("py"))
def test_code_that_needs_a_gpu_or_a_download_is_python(page):
    for code in blocks("py")[page]:
        compile(code, page, "exec")


def test_the_readme_takes_five_minutes():
    assert len(TEXTS["README.md"].splitlines()) <= 150


@pytest.mark.parametrize("page", ["README.md", "docs/benchmarks.md"])
def test_tables_are_what_report_generates_from_committed_results(page):
    assert "<!-- table: " in TEXTS[page]
    assert regenerated(TEXTS[page], ROOT) == TEXTS[page], (
        "run `python -m bench report --write README.md docs/benchmarks.md`"
    )


@pytest.mark.parametrize("path", TABLES)
def test_published_results_come_from_a_commit_and_passed_their_gate(path):
    result = read(ROOT / path)
    assert result.environment["commit"] and result.environment["clean"]
    assert result.rows and not any(row.failed for row in result.rows)


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_committed_results_name_no_path_and_can_be_read(path):
    assert not re.search(r"(/home|/root|/tmp|/Users|[A-Z]:\\\\)", path.read_text(encoding="utf-8"))
    assert path.name not in FILES or read(path).rows


@pytest.mark.parametrize(("name", "part"), re.findall(r"<!-- training: (\w+), (.+) -->", TEXTS["docs/training.md"]))
def test_the_tables_of_training_are_those_of_the_committed_results(name, part):
    told = TEXTS["docs/training.md"].split(f"<!-- training: {name}, {part} -->\n")[1].split("<!-- /training -->")[0]
    result = json.loads((ROOT / f"bench/results/training/{name}.json").read_text())
    assert told == f"{table(result[part])}\n"


@pytest.mark.parametrize("name", re.findall(r"<!-- tokens: (\S+) -->", TEXTS["docs/where-tokens-go.md"]))
def test_the_tables_of_tokens_are_those_of_the_committed_result(name):
    told = TEXTS["docs/where-tokens-go.md"].split(f"<!-- tokens: {name} -->\n")[1].split("<!-- /tokens -->")[0]
    result = json.loads((ROOT / "bench/results/tokens/camvid.json").read_text())
    found = {one.key: as_markdown(one) for one in tables(result)}
    header, rows = runs([result["all"] | {"name": "all frames"}], labelled=True)
    assert told == f"{(found | {'all': as_markdown(Table('all', '', '', header, rows))})[name]}\n"


def test_the_memory_of_large_folders_is_that_of_the_committed_result():
    runs = json.loads((ROOT / "bench/results/tokens/folder.json").read_text())["runs"]
    told = re.findall(
        r"on ([\d,]+) (?:generated scenes|it was)", TEXTS["docs/where-tokens-go.md"].replace("\n", " "), re.IGNORECASE
    )
    assert [int(count.replace(",", "")) for count in told] == [run["pictures"] for run in runs]
    for run in runs:
        assert f"{run['peak_rss_mib']} MiB" in TEXTS["docs/where-tokens-go.md"]


def test_the_hosts_microseconds_are_those_of_the_committed_result():
    measured = json.loads((ROOT / "bench/results/cpu-2-cores/host.json").read_text())
    columns = [measured[when]["microseconds"] for when in ("before", "since")]
    names = (
        "torch.add",
        "ragged_layer_norm",
        "ragged_linear, static",
        "ragged_attention",
        "exit_head",
        "gather_tokens",
    )
    for name in (*names, *(f"24 blocks, {of}" for of in ("plain ViT", "encoder", "timm", "from_timm"))):
        cells = " | ".join(f"{column[name]:,.1f}" for column in columns)
        assert f"| {cells} |" in TEXTS["docs/benchmarks.md"], name


def test_readme_and_docs_say_that_no_gpu_was_measured_as_long_as_none_was():
    measured = any(row.device == "cuda" for path in RESULTS if path.name in FILES for row in read(path).rows)
    assert ("No GPU figure has been measured yet" in TEXTS["README.md"]) != measured
    assert ("GPU figures are not measured yet" in TEXTS["docs/benchmarks.md"]) != measured


def test_every_public_name_is_documented():
    reference = {f"step_kernels.{name}": "docs/ops.md" for name in step_kernels.__all__}
    reference |= {f"step_kernels.model.{name}": "" for name in step_kernels.model.__all__}
    reference |= {f"step_kernels.model.train.{name}": "docs/training.md" for name in train.__all__}
    documented = {
        target: name for name, text in TEXTS.items() for target in re.findall(r"^::: (\S+)$", text, re.MULTILINE)
    }
    assert documented.keys() == reference.keys()
    assert [name for name, page in reference.items() if page and documented[name] != page] == []
    assert [name for name in step_kernels.model.__all__ if f"{name}" not in TEXTS["docs/models.md"]] == []


def test_dir_shows_what_is_public():
    assert sorted({*dir(step_kernels)} - {"__version__", "model"}) == sorted(step_kernels.__all__)


def test_the_readmes_table_names_every_op():
    section = TEXTS["README.md"].split("## The ops")[1].split("\n## ")[0]
    named = re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)
    others = {"Halting", "UnusedAcceleratorWarning", "current_backend", "selected_backend", "use_backend"}
    assert sorted([*named, *others]) == sorted(step_kernels.__all__)


@pytest.mark.parametrize("page", ["README.md", "docs/install.md"])
def test_environment_variables_are_those_the_code_reads(page):
    read_by_code = {
        name
        for folder in ("step_kernels", "model", "bench")
        for source in (ROOT / folder).rglob("*.py")
        for name in re.findall(r"environ(?:\.get)?[\[(]\"(\w+)\"", source.read_text(encoding="utf-8"))
    }
    assert set(re.findall(r"^\| `([A-Z_]+)` \|", TEXTS[page], re.MULTILINE)) == read_by_code


@pytest.mark.parametrize("page", LINKING)
def test_links_and_pictures_exist(page):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", LINKING[page]):
        assert ((ROOT / page).parent / target).exists(), target


def test_the_site_is_built_from_every_page():
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").split("nav:")[1].split("plugins:")[0]
    assert set(re.findall(r": (\S+\.md)$", nav, re.MULTILINE)) == {
        *(path.name for path in (ROOT / "docs").glob("*.md")),
        *("CONTRIBUTING.md", "CHANGELOG.md"),
    }
