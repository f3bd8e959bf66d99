"""`step-kernels tokens`: what the page says is what the saved decisions say, counted by other means; the page is whole and works."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import subprocess
from collections import Counter, defaultdict
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from train_cases import INFO, PATCH, SIZE, items, small_segmenter

import step_kernels_cli
from step_kernels.model import LinearDecoder, StepEncoder, StepSegmenter, Trace, VariancePolicy, save_checkpoint
from step_kernels.model.cli import tokens
from step_kernels.model.cli.tables import calibration_error, told
from step_kernels.model.train import Scenes

COUNT, IGNORED = 5, 255
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def run(*words: object) -> int:
    return step_kernels_cli.main([str(word) for word in words])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, StepSegmenter]:
    """A folder with a checkpoint, pictures of which some cannot be counted, and what the command made of them with labels and without."""
    folder, segmenter = tmp_path_factory.mktemp("tokens"), small_segmenter(exits=(1, 2), threshold=0.5)
    segmenter.encoder.exits["2"].threshold = 0.6
    scores = segmenter.eval().encoder.policy.scores(items(COUNT, 3)[0], patch_size=PATCH)
    taken = [float(each.detach().quantile(0.75)) for each in scores]  # some blocks of either side
    segmenter.encoder.policy.thresholds = taken
    save_checkpoint(segmenter, folder / "model", info=INFO)
    scenes = Scenes(COUNT, SIZE, 3)
    for name in ("images", "labels"):
        (folder / name).mkdir()
    for number in range(COUNT):
        pixels, labels = scenes[number]
        height, width = (60, 52) if number % 2 else (SIZE, 44)  # no multiple of the patches; another size
        labels = labels.clone()
        labels[:20, :20] = IGNORED
        if number == COUNT - 1:  # whole, and one border far from most of it
            width, labels[:], labels[:, 63:] = SIZE, 0, 1
        picture = Image.fromarray(pixels.permute(1, 2, 0).numpy()[:height, :width])
        picture.save(folder / f"images/a {number} <b>.png")
        Image.fromarray(labels.numpy().astype(np.uint8)[:height, :width]).save(folder / f"labels/a {number} <b>.png")
    (folder / "images/broken.jpg").write_bytes(b"no picture")
    picture.save(folder / "images/unlabelled.png")
    picture.save(folder / "images/odd.png")
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(folder / "labels/odd.png")
    words = ["tokens", folder / "model", folder / "images", "--device", "cpu", "--sweep", 2, "--pictures", 3]
    assert run(*words, "--out", folder / "with", "--labels", folder / "labels", "--thresholds", "0.3,1") == 1
    assert run(*words, "--out", folder / "without", "--scales", "0.5", "--policy-thresholds", "0,1") == 1
    return folder, segmenter


class Page(HTMLParser):
    """Elements that fetch, ids and links, tables by id: rows of (text, number or None)."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.images, self.others, self.ids, self.links = list[str](), list[str](), set[str](), set[str]()
        self.tables: dict[str, list[list[tuple[str, float | None]]]] = {}
        self.open, self.cell, self.depth = "", False, Counter[str]()
        self.text = path.read_text(encoding="utf-8")
        self.feed(self.text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.depth[tag] += 1
        self.ids.add(given.get("id") or "")
        self.images += [given["src"] or ""] if tag == "img" else []
        self.links |= {given["href"] or ""} if "href" in given else set()
        self.others += [tag] if tag in ("link", "iframe", "object", "embed", "video", "audio", "base") else []
        self.others += [f"{tag} {name}" for name in ("src", "srcset", "action") if tag != "img" and name in given]
        if tag == "table":
            self.open = given["id"] or ""
            self.tables[self.open.removeprefix("table-")] = []
        elif tag == "tr":
            self.tables[self.open.removeprefix("table-")].append([])
        elif tag in ("td", "th"):
            number = given.get("data-sort")
            self.tables[self.open.removeprefix("table-")][-1].append(("", None if number is None else float(number)))
        self.cell = tag in ("td", "th", "button") and bool(self.open)

    def handle_endtag(self, tag: str) -> None:
        self.depth[tag] -= 1
        self.cell = False

    def handle_data(self, data: str) -> None:
        if self.cell:
            row = self.tables[self.open.removeprefix("table-")][-1]
            row[-1] = (row[-1][0] + data, row[-1][1])


@pytest.mark.parametrize("kind", ["with", "without"])
def test_the_page_needs_no_other_file_and_holds_no_empty_table(made: tuple[Path, StepSegmenter], kind: str) -> None:
    page = Page(made[0] / kind / "tokens.html")
    shown, panels = (2, 6) if kind == "with" else (3, 5)  # with labels the last three files fail
    assert len(page.images) == shown * (panels + 3), (
        "pictures of the first panel: the photograph, and after the merge and two exits"
    )
    assert all(re.match(r"data:image/(png|jpeg);base64,[A-Za-z0-9+/=]{80,}$", image) for image in page.images)
    assert page.others == [] and not re.search(r"url\(|@import|https?://|fetch\(|import ", page.text)
    assert page.links <= {f"#{name}" for name in page.ids} and len(page.links) >= 10
    assert {name: count for name, count in page.depth.items() if count} == {
        "meta": 3,
        "img": len(page.images),
        "input": 1,
    }
    wanted = {"sides", "exits", "classes", "distances", "calibration", "resolutions", "thresholds", "images", "failed"}
    assert page.tables.keys() == wanted
    for name, (header, *rows) in page.tables.items():
        assert rows, name
        assert all(len(row) == len(header) and all(text for text, _ in row) for row in rows), name
    assert "a 0 &lt;b&gt;.png" in page.text and "a 0 <b>" not in page.text


def test_what_cannot_be_counted_is_named(made: tuple[Path, StepSegmenter], capsys: pytest.CaptureFixture[str]) -> None:
    folder, _ = made
    assert dict(json.loads((folder / "without/tokens.json").read_text())["failed"]) == {
        "broken.jpg": "not counted: not a picture that Pillow can read"
    }
    failed = dict(json.loads((folder / "with/tokens.json").read_text())["failed"])
    assert failed["odd.png"] == "not counted: expected labels of the picture's size, 64 x 64, got 4 x 4"
    assert failed.keys() == {"broken.jpg", "odd.png", "unlabelled.png"}
    assert run("tokens", folder / "model", folder / "images/broken.jpg", "--out", folder / "none") == 1
    assert "broken.jpg: not counted: " in capsys.readouterr().err and not (folder / "none/tokens.html").exists()
    assert run("tokens", folder / "model", folder / "images", "--out", folder / "x", "--labels", folder / "no") == 2
    assert "--labels expects a folder" in capsys.readouterr().err
    for words, message in (
        (["--thresholds", "2"], "threshold: expected a number of at most 1, got 2"),
        (["--scales", "0"], "expects positive factors"),
    ):
        assert run("tokens", folder / "model", folder / "images", "--out", folder / "x", *words) == 2
        assert message in capsys.readouterr().err and not (folder / "x").exists()


def test_out_of_memory_at_other_sizes_is_one_pictures_problem(
    made: tuple[Path, StepSegmenter], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def scaled(*_: object, **__: object) -> None:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")

    monkeypatch.setattr(tokens, "scaled", scaled)
    picture = made[0] / "images/a 0 <b>.png"
    assert run("tokens", made[0] / "model", picture, "--out", tmp_path, "--device", "cpu") == 1
    result = json.loads((tmp_path / "tokens.json").read_text())
    assert result["failed"] == [[picture.name, "counted as it is only: out of memory"]] and len(result["images"]) == 1
    assert "table-thresholds" not in (tmp_path / "tokens.html").read_text(encoding="utf-8")
    monkeypatch.setattr(tokens, "scaled", lambda *_, **__: 1 + torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError, match="inconsistent tensor size"):
        run("tokens", made[0] / "model", picture, "--out", tmp_path, "--device", "cpu")


def recounted(
    folder: Path, segmenter: StepSegmenter
) -> tuple[dict[str, dict[str, Counter]], dict[int, list[tuple]], list[list]]:
    """By kind and row: counts, token by token out of the .npz; of each exit (confidence, right); the pictures' rows."""
    kinds: dict[str, dict[str, Counter]] = {
        name: defaultdict(Counter) for name in ("sides", "classes", "distances", "exits")
    }
    seen, pictures = defaultdict(list), []
    dense = StepSegmenter(StepEncoder(segmenter.encoder.vit), segmenter.decoder).eval()
    for path in sorted((folder / "with/traces").glob("a*.npz")):
        file = np.load(path)
        image = np.asarray(Image.open(folder / f"images/{path.stem}.png"))
        labels = np.asarray(Image.open(folder / f"labels/{path.stem}.png"))
        pixels = (torch.tensor(image).permute(2, 0, 1)[None].float() / 255 - 0.5) / 0.25
        ours, plain = (model.predict(pixels)[0].numpy() for model in (segmenter.eval(), dense))
        tokens = [tuple(cell[1:]) for cell in file["cells"].tolist()]
        gone, alive, told_by = dict[tuple, int](), list(tokens), []
        for number, block in enumerate(file["blocks"].tolist()):
            halted, *told_of = (file[f"{name}_{number}"].tolist() for name in ("halted", "confidence", "labels"))
            told_by.append((block, list(zip(alive, *told_of, strict=True))))
            gone |= {token: block for token, out in zip(alive, halted, strict=True) if out}
            alive = [token for token, out in zip(alive, halted, strict=True) if not out]
        edges = np.zeros(labels.shape, bool)  # another label among the eight around
        for y, x in itertools.product(range(labels.shape[0]), range(labels.shape[1])):
            edges[y, x] = len(np.unique(labels[max(0, y - 1) : y + 2, max(0, x - 1) : x + 2])) > 1
        rough = {(y // PATCH, x // PATCH) for y, x in zip(*edges.nonzero(), strict=True)}
        own, majority = Counter(), {}
        for row, col, side in tokens:
            if not side:
                continue
            block = np.s_[row * PATCH : (row + side) * PATCH, col * PATCH : (col + side) * PATCH]
            known = labels[block] != IGNORED
            common = Counter(labels[block][known].tolist())
            best = min((-count, klass) for klass, count in common.items()) if common else (0, -1)
            majority[row, col, side] = best[1]
            away = min(max(row - y, y - row - side + 1, col - x, x - col - side + 1, 0) for y, x in rough)
            counts = Counter(
                tokens=1, patches=side**2, pixels=known.size, agreeing=(ours == plain)[block].sum(), common=-best[0],
                labelled=known.sum(), right=(ours[block] == labels[block])[known].sum(), dense_right=(plain[block] == labels[block])[known].sum(),
            )  # fmt: skip
            halts = (row, col, side) in gone
            counts |= Counter(
                {f"{name}, {'halted' if halts else 'others'}": counts[name] for name in ("tokens", "right", "labelled")}
            )
            leaves = f"after block {gone[row, col, side]}" if halts else "at the end"
            distance = ("a border inside", "1 patch away", "2 patches", "3 or 4", "3 or 4", "5 or more")[min(away, 5)]
            klass = "no label" if best[1] < 0 else Scenes.classes[best[1]]
            for kind, key in (
                ("sides", f"{side} x {side}"),
                ("classes", klass),
                ("distances", distance),
                ("exits", leaves),
            ):
                kinds[kind][key].update(counts)
            own.update(counts)
        for block, rows in told_by:
            seen[block] += [
                (sure, klass == majority[token]) for token, sure, klass in rows if majority.get(token, -1) >= 0
            ]
        pictures.append([f"{path.stem}.png", image.shape[1], image.shape[0], own])
    return kinds, seen, pictures


def test_the_pages_numbers_are_those_of_the_saved_decisions(made: tuple[Path, StepSegmenter]) -> None:
    folder, segmenter = made
    page = Page(folder / "with/tokens.html")
    kinds, seen, pictures = recounted(folder, segmenter)
    share = {
        "% of one class": ("common", "labelled"), "% as dense": ("agreeing", "pixels"), "% right": ("right", "labelled"),
        "% right, dense": ("dense_right", "labelled"), "% halt": ("tokens, halted", "tokens"),
        "% right, halted": ("right, halted", "labelled, halted"), "% right, others": ("right, others", "labelled, others"),
    }  # fmt: skip

    def check(
        cells: list[tuple[str, float | None]], header: list[str], own: Counter, whole: Counter, where: str
    ) -> None:
        for name, (text, number) in zip(header, cells, strict=True):
            if name in share:
                part, of = (own[each] for each in share[name])
                expected = 100 * part / of if of else None
            elif name in ("% of tokens", "% of patches"):
                expected = 100 * own[name[5:]] / whole[name[5:]]
            elif name == "patches a token":
                expected = own["patches"] / own["tokens"]
            elif name == "tokens":
                expected = own["tokens"]
            else:
                continue
            assert number == (None if expected is None else pytest.approx(expected, rel=1e-5)), (where, name)
            assert text == told(None if expected is None else int(expected) if name == "tokens" else float(expected)), (
                where,
                name,
            )

    for kind, rows in kinds.items():
        (header, *table), whole = page.tables[kind], sum(rows.values(), Counter())
        assert sorted(cells[0][0] for cells in table) == sorted(rows)
        for cells in table:
            check(cells, [text for text, _ in header], rows[cells[0][0]], whole, f"{kind} {cells[0][0]}")
    header, *table = page.tables["images"]
    assert len(table) == len(pictures) == COUNT
    for cells, (name, width, height, own) in zip(table, pictures, strict=True):
        assert [cells[0][0], cells[1][1], cells[2][1]] == [name, width, height]
        check(cells, [text for text, _ in header], own, own, name)
    assert len(kinds["distances"]) == 5 and len(kinds["sides"]) == 3 and "no label" in kinds["classes"]
    assert any(rows["at the end"]["tokens"] for rows in [kinds["exits"]]) and len(kinds["exits"]) == 3, (
        "each exit is taken"
    )
    for cells, (block, rows) in zip(page.tables["calibration"][1:], sorted(seen.items()), strict=True):
        bins: dict[int, list[tuple[float, bool]]] = defaultdict(list)
        for confidence, right in rows:
            bins[min(int(confidence * 15), 14)].append((confidence, right))
        gaps = (abs(sum(right for _, right in each) - sum(sure for sure, _ in each)) for each in bins.values())
        expected = [
            len(rows),
            *(100 * sum(column) / len(rows) for column in zip(*rows, strict=True)),
            100 * sum(gaps) / len(rows),
        ]
        assert cells[0][0] == f"after block {block}"
        assert [number for _, number in cells[1:]] == pytest.approx(expected, rel=1e-4)


def test_other_sizes_and_thresholds_are_runs_of_their_own(made: tuple[Path, StepSegmenter]) -> None:
    folder, segmenter = made
    result = json.loads((folder / "with/tokens.json").read_text())
    swept = [result["images"][number] for number in (0, 4)]  # of eight files the first and the fifth, as 2 are tried
    labels = sum(sum(own["labelled"]) for own in swept)
    by_name = {own["name"]: own for own in result["thresholds"] + result["resolutions"]}
    assert list(by_name) == [
        "as they are",
        "exits 0.3",
        "exits 1",
        *(f"policy {x:g}" for x in (0.3, 0.5, 0.7, 0.9, 0.97)),
        "0.5 x",
        "2 x",
    ]
    assert {name: own["pictures"] for name, own in by_name.items()} == dict.fromkeys(by_name, 2)

    def total(name: str, field: str, ends: slice = slice(None)) -> int:
        return sum(sum(counts[field][ends]) for counts in by_name[name]["sides"].values())

    assert total("as they are", "labelled") == labels and total("2 x", "labelled") == 4 * labels
    assert total("exits 1", "tokens", slice(-1)) == 0 < total("exits 0.3", "tokens", slice(-1))
    assert total("policy 0.97", "tokens") > total("policy 0.3", "tokens")
    assert (
        by_name["exits 1"]["dense_gflops"]
        == by_name["as they are"]["dense_gflops"]
        < by_name["2 x"]["dense_gflops"] / 4
    )
    never = StepSegmenter(segmenter.encoder.with_policy(segmenter.encoder.policy), segmenter.decoder)
    agreeing = 0
    for own in swept:
        pixels = (
            torch.tensor(np.asarray(Image.open(folder / "images" / own["name"]))).permute(2, 0, 1)[None] / 255 - 0.5
        ) / 0.25
        dense = StepSegmenter(StepEncoder(never.encoder.vit), never.decoder).eval().predict(pixels)
        for head in never.encoder.exits.values():
            head.threshold = 1.0
        agreeing += int((never.eval().predict(pixels) == dense).sum())
    for head, threshold in zip(never.encoder.exits.values(), (0.5, 0.6), strict=True):
        head.threshold = threshold
    assert total("exits 1", "agreeing") == agreeing


def test_a_model_that_neither_merges_nor_halts_has_a_page_too(tmp_path: Path) -> None:
    plain = small_segmenter(None, ())
    save_checkpoint(plain, tmp_path / "plain", info=INFO)
    Image.fromarray(Scenes(1, SIZE)[0][0].permute(1, 2, 0).numpy()).save(tmp_path / "a.png")
    words = ["--out", tmp_path / "out", "--device", "cpu", "--scales", "0.5"]
    assert run("tokens", tmp_path / "plain", tmp_path / "a.png", *words) == 0
    result = json.loads((tmp_path / "out/tokens.json").read_text())
    assert result["all"]["sides"].keys() == {"1"} and result["all"]["blocks"] == []
    assert sum(result["all"]["sides"]["1"]["agreeing"]) == SIZE**2
    merging = StepSegmenter(StepEncoder(plain.encoder.vit, VariancePolicy(0.4)), LinearDecoder(24, 6))
    save_checkpoint(merging, tmp_path / "merging", info=INFO)
    assert run("tokens", tmp_path / "merging", tmp_path / "a.png", *words) == 0
    names = [own["name"] for own in json.loads((tmp_path / "out/tokens.json").read_text())["thresholds"]]
    assert names == ["as they are", *(f"policy {0.4 * x:.3g}" for x in (0.5, 0.75, 1, 1.5, 2))]
    assert Trace.load(tmp_path / "out/traces/a.npz").layout.grid == (8, 8)


def test_the_calibration_error_of_known_bins() -> None:
    assert calibration_error([(4, 3.0, 2), (0, 0.0, 0), (6, 3.0, 5)]) == pytest.approx(100 * (1 + 2) / 10)
    assert calibration_error([(0, 0.0, 0)]) is None


DRIVE = """<script>
const before = document.body.dataset.exits, visible = () => [...document.querySelectorAll('.stack')[0].children].map(x => getComputedStyle(x).display)
const all = [visible()]
slider.focus(); slider.value = 0; slider.dispatchEvent(new Event('input')); all.push(visible())
const button = [...document.querySelectorAll('#table-images th button')].find(x => x.textContent === 'tokens')
button.focus(); button.click()
const column = () => [...document.querySelectorAll('#table-images tbody tr')].map(row => Number(row.cells[3].dataset.sort))
const down = column(); button.click()
document.body.append(Object.assign(document.createElement('pre'), { id: 'seen', textContent: JSON.stringify({
  before, all, told: slider.nextElementSibling.value, down, up: column(), focused: document.activeElement === button,
  sort: button.parentElement.getAttribute('aria-sort'), wide: document.documentElement.scrollWidth, view: innerWidth,
  broken: [...document.images].filter(x => !x.naturalWidth).length }) }))
</script>"""


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed to drive the page")
def test_slider_and_sorting_work_in_a_browser(made: tuple[Path, StepSegmenter], tmp_path: Path) -> None:
    text = (made[0] / "with/tokens.html").read_text(encoding="utf-8")
    (tmp_path / "page.html").write_text(text.replace("</body>", DRIVE + "</body>"), encoding="utf-8")
    options = [
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--window-size=500,800",
    ]
    command = [BROWSER, *options, "--dump-dom", (tmp_path / "page.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    found = re.search(r"<pre id=\"seen\">(.*?)</pre>", done.stdout)
    assert found, done.stderr[-2000:]
    seen = json.loads(found[1])
    assert seen["before"] == "2" and seen["told"] == "after the merge"
    assert seen["all"] == [["block", "none", "none", "block"], ["block", "block", "none", "none"]]
    assert seen["down"] == sorted(seen["down"], reverse=True) and seen["up"] == sorted(seen["down"])
    assert len(set(seen["down"])) > 1 and seen["sort"] == "ascending" and seen["focused"]
    assert seen["wide"] <= seen["view"] and seen["broken"] == 0
