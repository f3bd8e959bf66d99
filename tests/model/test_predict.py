"""The predict command: what it writes equals the segmenter's own labels; what it refuses, and how."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_cases import HEADS, save_segmenter, variant
from small_models import CLASSES, DIM, photographs, small_segmenter, small_vit

from step_kernels.model import (
    CheckpointInfo,
    LinearDecoder,
    StepEncoder,
    StepSegmenter,
    load_checkpoint,
    predict_windows,
    save_checkpoint,
)
from step_kernels.model.__main__ import main
from step_kernels.model.cli import predict
from step_kernels.model.cli.palettes import distinct_colours

Image = pytest.importorskip("PIL.Image", reason="Pillow comes with the extra predict")
pytest.importorskip("safetensors", reason="safetensors comes with the extra predict")

ROOT = Path(__file__).resolve().parents[2]
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
COLOURS = tuple((50 * i, 255 - 50 * i, 7 * i) for i in range(CLASSES))


def save_picture(path: Path, height: int, width: int, seed: int = 0, **options: Any) -> np.ndarray:
    """Noise with flat regions; the pixels."""
    noise = photographs(1, height, width, seed=seed)[0]
    pixels = (noise * 50 + 128).clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(path, **options)
    return pixels


def read(path: Path) -> tuple[str, np.ndarray]:
    with Image.open(path) as image:
        return image.mode, np.asarray(image).copy()


def model_input(pixels: np.ndarray, mean: tuple[float, ...] = MEAN, std: tuple[float, ...] = STD) -> torch.Tensor:
    image = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None] / 255
    return (image - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    info = CheckpointInfo("any", mean=MEAN, std=STD)
    return save_checkpoint(small_segmenter(), tmp_path_factory.mktemp("checkpoint"), info=info)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    return tmp_path


def run(checkpoint: Path, folder: Path, *names: str, options: tuple[str, ...] = ()) -> int:
    pictures = [str(folder / "in" / name) for name in names]
    return main(["predict", str(checkpoint), *pictures, "--out", str(folder / "out"), "--device", "cpu", *options])


def test_labels_are_the_segmenters_at_the_pictures_size(checkpoint: Path, folder: Path) -> None:
    """Sizes that no patch divides, portrait and landscape, in one run."""
    sizes = {"a.png": (61, 90), "b.png": (75, 33), "c.png": (64, 64)}
    pixels = {name: save_picture(folder / "in" / name, *size, seed=i) for i, (name, size) in enumerate(sizes.items())}
    assert run(checkpoint, folder, *sizes) == 0
    assert sorted(path.name for path in (folder / "out").iterdir()) == sorted(sizes)
    segmenter = load_checkpoint(checkpoint)
    for name, size in sizes.items():
        mode, labels = read(folder / "out" / name)
        assert mode == "L" and labels.shape == size and len(np.unique(labels)) > 1
        np.testing.assert_array_equal(labels, segmenter.predict(model_input(pixels[name]))[0])


def test_a_photograph_is_labelled_as_it_is_seen(checkpoint: Path, folder: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    pixels = save_picture(folder / "in" / "turned.png", 40, 64, exif=exif)
    assert run(checkpoint, folder, "turned.png") == 0
    expected = load_checkpoint(checkpoint).predict(model_input(np.rot90(pixels, -1)))[0]
    np.testing.assert_array_equal(read(folder / "out" / "turned.png")[1], expected)


def test_pixels_of_other_kinds_of_pictures(tmp_path: Path) -> None:
    """Grey of 16 bits keeps its range, transparency shows white, palettes and grey become colours."""
    grey = np.array([[0, 255, 257, 32768, 65535]], np.uint16)
    clear = Image.new("RGBA", (1, 1), (10, 20, 30, 0))
    palette = Image.new("P", (1, 1))
    palette.putpalette([9, 8, 7])
    for name, image, wanted in (
        ("deep", Image.fromarray(grey), [[0], [1], [1], [128], [255]]),
        ("clear", clear, [[255]]),
        ("palette", palette, [[9, 8, 7]]),
        ("grey", Image.new("L", (1, 1), 77), [[77]]),
    ):
        image.save(tmp_path / f"{name}.png")
        pixels = predict.read_picture(tmp_path / f"{name}.png")
        assert pixels.dtype == np.uint8 and pixels.shape[2] == 3
        assert (pixels[0] == wanted).all(), name
    for mode, value, message in (("F", 0.5, "no fixed white .mode F"), ("I", 1 << 20, "32-bit pixels")):
        Image.new(mode, (1, 1), value).save(tmp_path / "odd.tif")
        with pytest.raises(ValueError, match=message):
            predict.read_picture(tmp_path / "odd.tif")


def test_a_decompression_bomb_is_not_decoded(tmp_path: Path, monkeypatch) -> None:
    save_picture(tmp_path / "a.png", 40, 40)
    for limit in (1500, 700):  # Pillow warns above its limit, and refuses above twice that
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(ValueError, match="decompression bomb"):
            predict.read_picture(tmp_path / "a.png")


@pytest.mark.parametrize(
    ("options", "window", "stride", "crops"),
    [
        ("--window 32x48 --stride 20x30 --max-crops 3", (32, 48), (20, 30), 3),
        ("--window 40", (40, 40), None, None),
    ],
)
def test_windows(
    checkpoint: Path,
    folder: Path,
    monkeypatch,
    options: str,
    window: tuple[int, int],
    stride: tuple[int, int] | None,
    crops: int | None,
) -> None:
    asked = []

    def listen(*arguments: Any, **options: Any) -> torch.Tensor:
        asked.append((*arguments[2:], options))
        return predict_windows(*arguments, **options)

    monkeypatch.setattr(predict, "predict_windows", listen)
    pixels = save_picture(folder / "in" / "large.png", 61, 90)
    assert run(checkpoint, folder, "large.png", options=tuple(options.split())) == 0
    assert asked == [(window, stride, {"max_crops": crops})]
    segmenter, image = load_checkpoint(checkpoint), model_input(pixels)
    labels = read(folder / "out" / "large.png")[1]
    np.testing.assert_array_equal(labels, predict_windows(segmenter, image, window, stride)[0])
    assert (labels != segmenter.predict(image)[0].numpy()).any()


@pytest.mark.parametrize(
    ("told", "options", "mean", "std", "printed"),
    [
        (True, (), MEAN, STD, "mean 0.5, 0.4, 0.3 (the checkpoint's), std 0.2, 0.3, 0.25 (the checkpoint's)"),
        (True, ("--mean", "0.1,0.2,0.3"), (0.1, 0.2, 0.3), STD, "mean 0.1, 0.2, 0.3 (as given), std 0.2"),
        (True, ("--std", "1,0.5,0.9"), MEAN, (1.0, 0.5, 0.9), "std 1, 0.5, 0.9 (as given)"),
        (False, (), *IMAGENET, "std 0.229, 0.224, 0.225 (ImageNet's, as the checkpoint tells none)"),
    ],
)
def test_normalisation(folder: Path, capsys, told: bool, options, mean, std, printed: str) -> None:
    info = CheckpointInfo("any", mean=MEAN, std=STD) if told else None
    file = save_checkpoint(small_segmenter(None), folder / "model", info=info)
    pixels = save_picture(folder / "in" / "a.png", 40, 40)
    assert run(file, folder, "a.png", options=options) == 0
    assert printed in capsys.readouterr().out
    expected = load_checkpoint(file).predict(model_input(pixels, mean, std))[0]
    np.testing.assert_array_equal(read(folder / "out" / "a.png")[1], expected)


def test_dtype(checkpoint: Path, folder: Path, capsys) -> None:
    pixels = save_picture(folder / "in" / "a.png", 40, 40)
    assert run(checkpoint, folder, "a.png", options=("--dtype", "bfloat16")) == 0
    assert "step-kernels checkpoint, 5 classes, cpu bfloat16, mean" in capsys.readouterr().out
    expected = load_checkpoint(checkpoint).to(torch.bfloat16).predict(model_input(pixels).bfloat16())[0]
    np.testing.assert_array_equal(read(folder / "out" / "a.png")[1], expected)


def colours_of(path: Path) -> np.ndarray:
    """The colour of each pixel of a PNG with a palette."""
    with Image.open(path) as image:
        assert image.mode == "P"
        return np.asarray(image.convert("RGB"))


PALETTES = {
    "file.txt": "\n".join(f"{r} {g}, {b} class {r}" for r, g, b in COLOURS) + "\n\n1 2 3 more than needed\n",
    "hex.txt": "\n".join(f"#{bytes(colour).hex()} name" for colour in COLOURS),
}


@pytest.mark.parametrize("wanted", [*PALETTES, "cityscapes", "voc", "none", None])
def test_palettes_colour_the_labels_and_leave_their_values(folder: Path, wanted: str | None) -> None:
    file = save_checkpoint(small_segmenter(), folder / "model", info=CheckpointInfo("any", palette=COLOURS))
    options: tuple[str, ...] = () if wanted is None else ("--palette", wanted)
    if wanted in PALETTES:
        (folder / wanted).write_text(PALETTES[wanted])
        options = ("--palette", str(folder / wanted))
    save_picture(folder / "in" / "a.png", 40, 64)
    assert run(file, folder, "a.png", options=("--palette", "none")) == 0
    mode, labels = read(folder / "out" / "a.png")
    assert mode == "L" and {0, 1} <= set(np.unique(labels))
    assert run(file, folder, "a.png", options=options) == 0
    np.testing.assert_array_equal(read(folder / "out" / "a.png")[1], labels)
    if wanted != "none":
        first = {"cityscapes": ((128, 64, 128), (244, 35, 232)), "voc": ((0, 0, 0), (128, 0, 0))}
        for number, colour in enumerate(first.get(str(wanted), COLOURS)):
            assert (colours_of(folder / "out" / "a.png")[labels == number] == colour).all()


def test_distinct_colours_are_pascal_vocs() -> None:
    """Its published map: background, aeroplane, bicycle, ..., tvmonitor, border."""
    colours = distinct_colours(1000)
    known = {1: (128, 0, 0), 2: (0, 128, 0), 5: (128, 0, 128), 8: (64, 0, 0), 20: (0, 64, 128), 255: (224, 224, 192)}
    assert all(tuple(colours[number]) == colour for number, colour in known.items())
    assert len({tuple(colour) for colour in colours}) == 1000


@pytest.mark.parametrize("palette", ["none", "cityscapes"])
def test_overlay(checkpoint: Path, folder: Path, palette: str) -> None:
    pixels = save_picture(folder / "in" / "a.png", 40, 40)
    assert run(checkpoint, folder, "a.png", options=("--overlay", "--palette", palette)) == 0
    mode, overlay = read(folder / "out" / "a_overlay.png")
    labels = read(folder / "out" / "a.png")[1]
    first = (128, 64, 128) if palette == "cityscapes" else (0, 0, 0)
    half = (pixels.astype(float) + first) / 2
    assert mode == "RGB" and (labels == 0).any()
    assert np.abs(overlay - half)[labels == 0].max() <= 0.5


def test_more_than_256_classes_become_sixteen_bits(folder: Path) -> None:
    torch.manual_seed(0)
    decoder = LinearDecoder(DIM, 300)
    torch.nn.init.normal_(decoder.head.weight)
    file = save_checkpoint(StepSegmenter(StepEncoder(small_vit(1)), decoder), folder / "model")
    pixels = save_picture(folder / "in" / "a.png", 40, 40)
    assert run(file, folder, "a.png", options=("--palette", "voc", "--overlay")) == 0
    mode, labels = read(folder / "out" / "a.png")
    expected = load_checkpoint(file).predict(model_input(pixels, *IMAGENET))[0]
    assert mode == "I;16" and labels.max() > 255
    np.testing.assert_array_equal(labels, expected)
    assert read(folder / "out" / "a_overlay.png")[1].shape == (40, 40, 3)


def test_bad_files_are_named_at_the_end_and_the_others_are_labelled(checkpoint: Path, folder: Path, capsys) -> None:
    inside = folder / "in"
    for number, name in enumerate(["first.png", "last.png"]):
        save_picture(inside / name, 40, 40, number)
    (inside / "text.jpg").write_text("no picture")
    (inside / "cut.jpg").write_bytes((inside / "first.png").read_bytes()[:400])
    (inside / "deeper").mkdir()
    os.mkfifo(inside / "pipe.png")
    names = ["first.png", "missing.png", "text.jpg", "cut.jpg", "deeper", "pipe.png", "new\nline.png", "last.png"]
    assert run(checkpoint, folder, *names) == 1
    captured = capsys.readouterr()
    assert "2 of 8 pictures labelled" in captured.out
    named = [line for line in captured.err.splitlines() if line.startswith("not labelled: ")]
    assert named == [
        f"not labelled: {inside}/missing.png: not there",
        f"not labelled: {inside}/text.jpg: not a picture that Pillow can read",
        f"not labelled: {inside}/cut.jpg: broken file (OSError)",
        f"not labelled: {inside}/deeper: a folder, not a picture",
        f"not labelled: {inside}/pipe.png: neither a file nor a folder",
        f"not labelled: {inside}/new line.png: not there",
    ]
    assert sorted(path.name for path in (folder / "out").iterdir()) == ["first.png", "last.png"]


ERRORS = [
    (ValueError("count: expected at most 4"), "count: expected at most 4"),
    (torch.OutOfMemoryError("CUDA out of memory"), "out of GPU memory: try --window, or a smaller --max-crops"),
    (MemoryError(), "out of memory: try --window"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"), "out of memory: try --window"),
]


@pytest.mark.parametrize(("error", "message"), ERRORS)
def test_a_picture_that_the_model_cannot_take_is_named(
    checkpoint: Path, folder: Path, monkeypatch, capsys, error: Exception, message: str
) -> None:
    labels = predict.Labeller.labels

    def refuse_large(self: predict.Labeller, pixels: np.ndarray) -> np.ndarray:
        if pixels.shape[0] > 60:
            raise error
        return labels(self, pixels)

    monkeypatch.setattr(predict.Labeller, "labels", refuse_large)
    for name, height in (("good.png", 40), ("large.png", 64)):
        save_picture(folder / "in" / name, height, 40)
    assert run(checkpoint, folder, "large.png", "good.png") == 1
    assert f"large.png: {message}\n" in capsys.readouterr().err
    assert [path.name for path in (folder / "out").iterdir()] == ["good.png"]


def test_other_errors_are_not_taken_for_a_bad_picture(checkpoint: Path, folder: Path, monkeypatch) -> None:
    def broken(self: predict.Labeller, pixels: np.ndarray) -> np.ndarray:
        raise RuntimeError("a bug")

    monkeypatch.setattr(predict.Labeller, "labels", broken)
    save_picture(folder / "in" / "a.png", 40, 40)
    with pytest.raises(RuntimeError, match="a bug"):
        run(checkpoint, folder, "a.png")


def test_a_result_that_cannot_be_written_is_named_and_leaves_nothing(checkpoint: Path, folder: Path, capsys) -> None:
    save_picture(folder / "in" / "a.png", 16, 16)
    (folder / "out" / "a.png").mkdir(parents=True)
    assert run(checkpoint, folder, "a.png") == 1
    assert "a.png: the result cannot be written: Is a directory" in capsys.readouterr().err
    assert [path.name for path in (folder / "out").iterdir()] == ["a.png"]


MISUSE = [
    ("", "the following arguments are required: IMAGE"),
    ("a.png --window 0", "--window: expects positive pixels such as 512"),
    ("a.png --window 1x2x3", "got '1x2x3'"),
    ("a.png --window 32 --stride 33", "--stride expects at most --window (32x32)"),
    ("a.png --stride 8", "--stride needs --window"),
    ("a.png --max-crops 8", "--max-crops needs --window"),
    ("a.png --window 8 --max-crops 0", "--max-crops expects at least 1"),
    ("a.png --palette rainbow", "--palette expects cityscapes, voc, none or a file, got 'rainbow'"),
    ("a.png --palette /", "--palette / cannot be read: Is a directory"),
    ("a.png --device toaster", "--device expects cpu, cuda or cuda:N, got 'toaster'"),
    ("a.png --device meta", "--device expects cpu, cuda or cuda:N, got 'meta'"),
    ("a.png --device cuda:99", "--device cuda:99 is not there"),
    ("a.png --dtype int8", "argument --dtype: invalid choice: 'int8'"),
    ("a.png --mean 0.5", "expects red,green,blue"),
    ("a.png --mean 123.7,116.3,103.5", "for pixels scaled to 0..1"),
    ("a.png --mean nan,0,0", "for pixels scaled to 0..1"),
    ("a.png --std 0.5,0,0.5", "--std expects positive values"),
    ("a.png --fast", "unrecognized arguments: --fast"),
    ("a.png a.jpg", "would both become"),
    ("a.png a_overlay.jpg --overlay", "would both become"),
    ("a.png --num-heads 3", "num_heads: expected None"),
]


@pytest.mark.parametrize(("arguments", "message"), MISUSE)
def test_misuse_gets_one_line_and_status_2(
    checkpoint: Path, tmp_path: Path, capsys, arguments: str, message: str
) -> None:
    assert main(["predict", str(checkpoint), "--out", str(tmp_path / "out"), *arguments.split()]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert captured.err.startswith("step_kernels.model: ") and message in captured.err
    assert not list(tmp_path.glob("out/*"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 2 3\n" * (CLASSES - 1), "has 4 colours, the checkpoint has 5 classes"),
        ("1 2 3\nred\n", "line 2: expects R G B or #rrggbb, got 'red'"),
        ("1 2 3\n#12345\n", "line 2: expects R G B or #rrggbb"),
        ("1 2 3\n1 2 3.5\n", "line 2: expects R G B or #rrggbb"),
        ("1 2 3\n0 0 256\n", "has (0, 0, 256) for class 1, expected red, green, blue in 0..255"),
        ("", "has 0 colours"),
    ],
)
def test_palette_files_are_checked(checkpoint: Path, folder: Path, capsys, text: str, message: str) -> None:
    (folder / "palette.txt").write_text(text)
    assert run(checkpoint, folder, "a.png", options=("--palette", str(folder / "palette.txt"))) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("palette", [((1, 2, 3),), ((1, 2),) * CLASSES])
def test_a_checkpoints_bad_palette_is_refused(folder: Path, capsys, palette: tuple[tuple[int, ...], ...]) -> None:
    file = save_checkpoint(small_segmenter(None), folder / "model", info=CheckpointInfo("any", palette=palette))
    save_picture(folder / "in" / "a.png", 16, 16)
    assert run(file, folder, "a.png") == 2
    assert "the checkpoint's palette" in capsys.readouterr().err
    assert not (folder / "out").exists(), "made for nothing"
    assert run(file, folder, "a.png", options=("--palette", "none")) == 0


def test_out_must_be_a_folder_that_can_be_written(checkpoint: Path, folder: Path, monkeypatch, capsys) -> None:
    command = ["predict", str(checkpoint), "a.png", "--out"]
    (folder / "file").write_text("")
    assert main([*command, str(folder / "file" / "below")]) == 2
    assert "below cannot be written: Not a directory" in capsys.readouterr().err

    def read_only(**options: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(predict.tempfile, "TemporaryFile", read_only)
    assert main([*command, str(folder)]) == 2
    assert f"--out {folder} cannot be written: Permission denied" in capsys.readouterr().err


def test_a_picture_is_never_overwritten(checkpoint: Path, folder: Path, capsys) -> None:
    pixels = save_picture(folder / "in" / "a.png", 16, 16)
    (folder / "out").symlink_to(folder / "in")
    assert run(checkpoint, folder, "a.png") == 2
    assert "would overwrite a picture" in capsys.readouterr().err
    np.testing.assert_array_equal(read(folder / "in" / "a.png")[1], pixels)


@pytest.mark.parametrize("kind", ["missing", "text", "empty folder", "no decoder", "four channels"])
def test_checkpoints_that_cannot_label(folder: Path, capsys, kind: str) -> None:
    path = folder / "model.pth"
    if kind == "text":
        path.write_text("no checkpoint")
    elif kind == "empty folder":
        path.mkdir()
    elif kind == "no decoder":
        path = save_checkpoint(StepEncoder(small_vit(1)), folder / "model")
    elif kind == "four channels":
        vit = type(small_vit(1)).preset("tiny", img_size=64, embed_dim=DIM, depth=1, num_heads=3, in_chans=4)
        path = save_checkpoint(StepSegmenter(StepEncoder(vit), LinearDecoder(DIM, CLASSES)), folder / "model")
    assert run(path, folder, "a.png") == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and str(path) in captured.err
    expected = {"no decoder": "without decoder", "four channels": "takes 4 channels", "missing": "does not exist"}
    assert expected.get(kind, "expected") in captured.err


@pytest.mark.parametrize("arguments", [[], ["paint"], ["--fast"]])
def test_unknown_commands(capsys, arguments: list[str]) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "expected a command (predict" in error


def test_help(capsys) -> None:
    assert main(["--help"]) == 0
    assert "predict" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        main(["predict", "--help"])
    assert ended.value.code == 0 and "--palette" in capsys.readouterr().out


@pytest.mark.parametrize(("module", "package"), [("PIL", "Pillow"), ("tqdm", "tqdm")])
def test_a_missing_package_is_named(module: str, package: str) -> None:
    code = f"import sys; sys.modules['{module}'] = None; from step_kernels.model.__main__ import main; sys.exit(main(['predict']))"
    finished = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert finished.returncode == 2 and finished.stderr.count("\n") == 1
    assert f"{package} is needed" in finished.stderr and "step-kernels[predict]" in finished.stderr


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (KeyboardInterrupt(), 130, "step_kernels.model: interrupted\n"),
        (torch.OutOfMemoryError("CUDA out of memory.\nTried"), 1, "out of GPU memory (CUDA out of memory.)"),
    ],
)
def test_interruption_and_memory(monkeypatch, capsys, error: BaseException, status: int, message: str) -> None:
    def stop(arguments: object) -> int:
        raise error

    monkeypatch.setattr(predict, "main", stop)
    assert main(["predict"]) == status
    assert message in capsys.readouterr().err


def test_from_a_shell(checkpoint: Path, folder: Path) -> None:
    """As a user runs it: no traceback, and no bar where there is no terminal."""
    save_picture(folder / "in" / "a.png", 16, 16)
    good, bad, out = (str(folder / name) for name in ("in/a.png", "in/b.png", "out"))
    command = [sys.executable, "-m", "step_kernels.model", "predict", str(checkpoint), good, bad, "--out", out]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert finished.stderr == f"not labelled: {bad}: not there\n"
    assert finished.returncode == 1
    lines = finished.stdout.splitlines()
    assert len(lines) == 2 and lines[1].startswith("1 of 2 pictures labelled in ") and lines[1].endswith(f": {out}")


def test_a_checkpoint_of_segmenters_own_format(folder: Path, capsys) -> None:
    """Its variant.yml names the normalisation; without it the number of heads has to be given."""
    pixels = save_picture(folder / "in" / "a.png", 30, 44)
    file = save_segmenter(folder / "model", "mask_transformer", variant("mask_transformer", normalization="vit"))
    assert run(file, folder, "a.png") == 0
    assert (
        "Segmenter checkpoint, 7 classes, cpu float32, mean 0.5, 0.5, 0.5 (the checkpoint's)" in capsys.readouterr().out
    )
    half = (0.5, 0.5, 0.5)
    expected = load_checkpoint(file).predict(model_input(pixels, half, half))[0]
    np.testing.assert_array_equal(read(folder / "out" / "a.png")[1], expected)
    bare = save_segmenter(folder / "bare", "mask_transformer", None)
    assert run(bare, folder, "a.png") == 2
    assert "num_heads" in capsys.readouterr().err
    options = ("--num-heads", str(HEADS), "--mean", "0.5,0.5,0.5", "--std", "0.5,0.5,0.5")
    assert run(bare, folder, "a.png", options=options) == 0
    np.testing.assert_array_equal(read(folder / "out" / "a.png")[1], expected)
