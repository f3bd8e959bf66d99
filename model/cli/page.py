"""The page of `step-kernels tokens`: one file that needs no other, with every picture in it."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from .census import Outcome
from .drawing import DEPTHS, END, PALETTE, SIDES, depth_map, overlay, side_map
from .tables import RUN, RUN_LABELLED, Table, Value, run, tables, told

__all__ = ["page", "panels"]

Points = Sequence[tuple[float, float]]
WIDTH = 480  # of the page's pictures at most, in pixels
SAME, BOTH, WORSE, BETTER = "#f4f1ea", "#8a93a0", "#d1495b", "#2a8c82"  # of labels that differ from the dense model's

STYLE = """
:root { color-scheme: light; --ink: #1f2430; --dim: #5b6472; --line: #dcdfe4; --fill: #e3eef2; --accent: #2f5d8a }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 1180px; padding: 1rem; font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: #fff }
h1 { font-size: 1.6rem; margin: .5rem 0 } h2 { font-size: 1.25rem; margin: 2.2rem 0 .2rem } h3 { font-size: 1rem; margin: 1rem 0 .3rem }
p { margin: .3rem 0; max-width: 75ch } .dim, figcaption, small { color: var(--dim) }
a { color: var(--accent) } :focus-visible { outline: 3px solid #e69f00; outline-offset: 2px }
.skip { position: absolute; left: -999px } .skip:focus { left: 1rem; background: #fff; padding: .3rem }
nav ul { display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; padding: 0; list-style: none }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: .6rem; margin: 1rem 0 }
dl div { border: 1px solid var(--line); border-radius: 6px; padding: .5rem .7rem } dt { font-size: .85rem; color: var(--dim) }
dd { margin: 0; font-size: 1.3rem; font-variant-numeric: tabular-nums }
.scroll { overflow-x: auto; max-height: 75vh; border: 1px solid var(--line); border-radius: 6px; margin: .6rem 0 }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .6rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line) }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: #fff }
thead th { position: sticky; top: 0; background: #f4f6f8; z-index: 1; vertical-align: bottom; min-width: 4.6rem } thead th:first-child { z-index: 2; background: #f4f6f8 }
th button { font: inherit; font-weight: 600; color: inherit; background: none; border: 0; padding: 0; cursor: pointer; text-align: inherit; white-space: normal }
th[aria-sort=ascending] button::after { content: " \\25B2" } th[aria-sort=descending] button::after { content: " \\25BC" }
td.share { background: linear-gradient(90deg, var(--fill) var(--v), transparent var(--v)) }
.slider { position: sticky; top: 0; z-index: 3; background: #fff; border-bottom: 1px solid var(--line); padding: .5rem 0; display: flex; flex-wrap: wrap; gap: .2rem 1rem; align-items: center }
.slider input { flex: 1 1 200px; max-width: 420px; accent-color: var(--accent) } .slider output { min-width: 12em }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(48%, 300px), 1fr)); gap: .8rem }
figure { margin: 0 } figcaption { font-size: .85rem } .stack { position: relative; border: 1px solid var(--line) } .stack img { display: block; width: 100%; height: auto }
.stack img + img { position: absolute; inset: 0; height: 100%; display: none } .flat img { image-rendering: pixelated }
.key { display: flex; flex-wrap: wrap; gap: .2rem .9rem; font-size: .85rem; margin: .3rem 0 } .key i { display: inline-block; width: .9em; height: .9em; margin-right: .35em; border: 1px solid #8a93a0; vertical-align: -.08em }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 330px), 1fr)); gap: 1rem } svg { width: 100%; height: auto; max-width: 460px; font-size: 11px }
"""
SCRIPT = """
const slider = document.querySelector('.slider input')
if (slider) slider.oninput = () => {
  document.body.dataset.exits = slider.value
  slider.nextElementSibling.value = slider.dataset.names.split('|')[slider.value]
}
document.querySelectorAll('th button').forEach(button => button.onclick = () => {
  const head = button.parentElement, table = head.closest('table'), place = head.cellIndex
  const sign = head.getAttribute('aria-sort') === 'descending' ? 1 : -1
  table.querySelectorAll('th').forEach(other => other.removeAttribute('aria-sort'))
  head.setAttribute('aria-sort', sign < 0 ? 'descending' : 'ascending')
  const key = row => row.cells[place].dataset.sort ?? row.cells[place].textContent
  const order = (a, b) => (isNaN(a) || isNaN(b) ? a.localeCompare(b, undefined, { numeric: true }) : a - b)
  const rows = [...table.tBodies[0].rows].sort((a, b) => sign * order(key(a), key(b)))
  table.tBodies[0].append(...rows)
})
"""
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def page(result: dict[str, Any], drawn: Sequence[str], palette: np.ndarray) -> str:
    """HTML of what tokens.json holds; ``drawn``: `panels` of some pictures, ``palette``: the classes' colours."""
    whole, model, labelled = result["all"], result["model"], result["labels"]
    ends = ["after the merge", *(f"after block {block}" for block in whole["blocks"])]
    sections = {"overview": ("Overview", overview(result))}
    if drawn:
        sections["drawn"] = ("Where they go", slider(ends) + keys(result, palette) + "".join(drawn))
    for table in tables(result):
        sections[table.key] = (
            table.title,
            f"<p class=dim>{escape(table.note)}</p>{charts(table.key, result)}{as_html(table)}",
        )
    if result["failed"]:
        rows: list[list[Value]] = [list(each) for each in result["failed"]]
        sections["failed"] = ("Not counted", as_html(Table("failed", "", "", ["picture", "reason"], rows)))
    links = "".join(f"<li><a href='#{key}'>{title}</a></li>" for key, (title, _) in sections.items())
    body = "".join(
        f"<section id={key}><h2>{title}</h2>{content}</section>" for key, (title, content) in sections.items()
    )
    layers = "".join(f"[data-exits='{i}'] .o{i} {{ display: block !important }}" for i in range(len(ends)))
    exits = ", ".join(f"{block} (threshold {value:g})" for block, value in model["exits"].items())
    about = f"{model['checkpoint']}: {model['depth']} blocks of width {model['width']}, patches of {model['patch_size']} pixels, {model['dtype']}, policy "
    about += f"{model['policy']}, exits after blocks {exits or 'none'}. {'With' if labelled else 'Without'} labels."
    return (
        "<!doctype html><html lang=en><head><meta charset=utf-8><meta name=viewport content='width=device-width, initial-scale=1'>"
        f'<meta http-equiv=Content-Security-Policy content="{POLICY}"><title>Where tokens go</title><style>{STYLE}{layers}</style></head>'
        f"<body data-exits={len(ends) - 1}><a class=skip href='#overview'>Skip to the figures</a><h1>Where tokens go</h1>"
        f"<p>{escape(about)}</p><nav aria-label=Contents><ul>{links}</ul></nav><main>{body}</main><script>{SCRIPT}</script></body></html>\n"
    )


def overview(result: dict[str, Any]) -> str:
    values = run(result["all"], result["labels"])
    tiles = (
        f"<div><dt>{name}</dt><dd>{told(value)}</dd></div>"
        for name, value in zip(RUN + RUN_LABELLED, values, strict=False)
    )
    dense = "dense: the same weights, which neither merge nor halt. Tokens are counted after the merge, without prefix tokens."
    return f"<dl>{''.join(tiles)}</dl><p class=dim>{dense}</p>"


def slider(ends: Sequence[str]) -> str:
    last = len(ends) - 1
    return (
        f"<div class=slider><label for=exits>Tokens</label><input type=range id=exits min=0 max={last} value={last} "
        f"data-names='{'|'.join(ends)}'><output for=exits>{ends[-1]}</output></div>"
    )


def keys(result: dict[str, Any], palette: np.ndarray) -> str:
    """What colours mean."""
    sides = {f"{side} x {side}": SIDES[int(side)] for side in result["all"]["sides"]}
    late = (*DEPTHS, *DEPTHS[-1:] * len(result["all"]["blocks"]))
    exits = {f"halts after block {block}": colour for block, colour in zip(result["all"]["blocks"], late, strict=False)}
    colours = ["#" + bytes(colour).hex() for colour in palette.tolist()]
    classes = {
        name: colours[i] for i, name in enumerate(result["model"]["classes"]) if name in result["all"]["classes"]
    }
    differs = {"as dense": SAME, "both wrong, or no label" if result["labels"] else "differs": BOTH}
    differs |= {"dense was right": WORSE, "dense was wrong": BETTER} if result["labels"] else {}
    lines = (
        "".join(f"<span><i style='background:{colour}'></i>{escape(name)}</span>" for name, colour in key.items())
        for key in (sides, exits | {"reaches the end": END}, classes, differs)
    )
    return "".join(f"<div class=key>{line}</div>" for line in lines)


def panels(name: str, pixels: np.ndarray, seen: Outcome, patch: int, palette: np.ndarray) -> str:
    """One picture's part of the page."""
    from PIL import Image

    height, width = pixels.shape[:2]
    small = (min(width, WIDTH), max(1, round(height * min(1, WIDTH / width))))
    scale = max(4, min(16, WIDTH // seen.trace.layout.grid[1]))

    def own(cells: np.ndarray, repeat: int) -> np.ndarray:
        """Without the padding's part."""
        wide = cells.repeat(repeat, 0).repeat(repeat, 1)
        return wide[: -(-height * scale // patch), : -(-width * scale // patch)]

    photo = uri(Image.fromarray(pixels).resize(small, Image.Resampling.LANCZOS), "JPEG", quality=80)
    layers = [photo]
    for exits in range(1 + len(seen.trace.stages)):
        drawn = Image.fromarray(own(overlay(seen.trace, exits, scale), 1))
        drawn.putpalette(PALETTE[:, :3].tobytes())
        layers.append(uri(drawn, "PNG", transparency=PALETTE[:, 3].tobytes(), optimize=True))
    found = {
        "Supertokens, tinted once they halt": layers,
        "Side of the block": [flat(own(side_map(seen.trace), scale))],
    }
    if seen.trace.stages:
        found["Exit"] = [flat(own(depth_map(seen.trace), scale))]
    steps = (np.arange(small[1]) * height // small[1])[:, None], np.arange(small[0]) * width // small[0]
    found["Prediction"] = [flat(palette[seen.predictions[steps]])]
    found["Difference to dense"] = [flat(differences(seen)[steps])]
    if seen.labels is not None:
        with_none = np.vstack([palette, [[255, 255, 255]]]).astype(np.uint8)
        found["Labels"] = [flat(with_none[np.minimum(seen.labels, len(palette))[steps]])]
    figures = []
    for caption, images in found.items():
        text = escape(f"{caption}: {name}")
        shown = "".join(f"<img class=o{i - 1} src='{image}' alt='{text}'>" for i, image in enumerate(images))
        figures.append(
            f"<figure><div class='stack{' flat' * (len(images) == 1)}'>{shown}</div><figcaption>{caption}</figcaption></figure>"
        )
    counts = seen.trace.summary()
    stages = "; ".join(f"{stage['halted']} halt after block {stage['block']}" for stage in counts["stages"][1:])
    line = f"{counts['patches']} patches, {counts['stages'][0]['tokens']} tokens" + (f"; {stages}" if stages else "")
    return f"<article><h3>{escape(name)} <small>{line}</small></h3><div class=panels>{''.join(figures)}</div></article>"


def differences(seen: Outcome) -> np.ndarray:
    """Colours [H, W, 3] of where labels are not the dense model's, and who was right."""
    code = (seen.predictions != seen.dense).astype(int)
    if seen.labels is not None:
        code[(code == 1) & (seen.dense == seen.labels)] = 2
        code[(code == 1) & (seen.predictions == seen.labels)] = 3
    return np.array([tuple(bytes.fromhex(colour[1:])) for colour in (SAME, BOTH, WORSE, BETTER)], np.uint8)[code]


def flat(colours: np.ndarray) -> str:
    from PIL import Image

    return uri(Image.fromarray(colours), "PNG", optimize=True)


def uri(image: Any, kind: str, **named: Any) -> str:
    """The picture itself as an address."""
    image.save(file := io.BytesIO(), kind, **named)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def as_html(table: Table) -> str:
    """Its heads are buttons that sort; shares have a bar."""
    heads = "".join(f"<th scope=col><button>{escape(name)}</button></th>" for name in table.header)
    rows = []
    for row in table.rows:
        cells = []
        for name, value in zip(table.header, row, strict=True):
            number = isinstance(value, (int, float))
            sort = f" data-sort={value:.6g}" if number else ""
            bar = f" class=share style='--v:{value:.1f}%'" if number and name.startswith("%") else ""
            cells.append(f"<td{sort}{bar}>{escape(told(value))}</td>")
        rows.append(f"<tr>{''.join(cells)}</tr>")
    return f"<div class=scroll role=region aria-label='{escape(table.title)}' tabindex=0><table id=table-{table.key}><thead><tr>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"


def charts(key: str, result: dict[str, Any]) -> str:
    """Those that belong to a table."""
    found, lines = [], dict[str, list[tuple[float, float]]]()
    if key == "calibration":
        for block, bins in result["all"]["bins"].items():
            lines[f"block {block}"] = [
                (100 * sure / count, 100 * right / count) for count, sure, right in bins if count
            ]
        found = [chart("How often right, % (reliability)", lines, "confidence, %", (0, 100), True)]
    for kind in ("exits", "policy") if key == "thresholds" else ():
        tried = [(own["value"], *run(own, False)[2:6]) for own in result["thresholds"] if own["kind"] == kind]
        if len({value for value, *_ in tried}) > 1:
            lines = {"% as dense": [(value, dense or 0) for value, _, _, _, dense in tried]}
            lines["% of tokens halt"] = [(value, halt or 0) for value, _, _, halt, _ in tried]
            lines["tokens, % of patches"] = [(value, 100 / (reduction or 1)) for value, reduction, *_ in tried]
            span = min(value for value, *_ in tried), max(value for value, *_ in tried)
            found.append(chart(f"Threshold of the {kind}", lines, "threshold", span))
    return f"<div class=charts>{''.join(found)}</div>" if found else ""


def chart(
    title: str, lines: Mapping[str, Points], label: str, span: tuple[float, float], diagonal: bool = False
) -> str:
    """Lines over an axis, in percent, as SVG."""
    left, top, width, height = 38, 24, 300, 170
    low, high = span

    def at(x: float, y: float) -> str:
        return f"{left + width * (x - low) / (high - low):.1f},{top + height * (1 - y / 100):.1f}"

    parts = [f"<text x={left} y=14 font-weight=600>{escape(title)}</text>"]
    for tick in range(5):
        x, y = left + width * tick / 4, top + height * tick / 4
        parts.append(
            f"<path d='M{left} {y}h{width}' stroke='#dcdfe4'/><text x={left - 5} y={y + 4} text-anchor=end>{100 - 25 * tick}</text>"
        )
        parts.append(f"<text x={x} y={top + height + 15} text-anchor=middle>{low + (high - low) * tick / 4:.3g}</text>")
    parts.append(f"<text x={left + width / 2} y={top + height + 30} text-anchor=middle>{escape(label)}</text>")
    if diagonal:
        parts.append(
            f"<polyline points='{at(low, 0)} {at(high, 100)}' fill=none stroke='#8a93a0' stroke-dasharray='4 3'/>"
        )
    for number, (name, points) in enumerate(lines.items()):
        colour, places = DEPTHS[number % len(DEPTHS)], [at(x, y) for x, y in points]
        parts.append(f"<polyline points='{' '.join(places)}' fill=none stroke='{colour}' stroke-width=2 />")
        parts += [
            f"<circle cx={place.split(',')[0]} cy={place.split(',')[1]} r=3 fill='{colour}' />" for place in places
        ]
        y = top + height + 46 + 14 * number
        parts.append(
            f"<rect x={left} y={y - 8} width=10 height=10 fill='{colour}' /><text x={left + 16} y={y}>{escape(name)}</text>"
        )
    return f"<svg viewBox='0 0 350 {top + height + 44 + 14 * len(lines)}' role=img aria-label='{escape(title)}'>{''.join(parts)}</svg>"
