"""A benchmark's report as one page of HTML: scores, protocol, and prompts with pictures that open large."""

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from PIL import Image

from tbac.pictures import PictureError, open_picture

THUMBNAIL = 320  # most pixels of a side of what the page itself holds
SMALL = 128  # pictures with sides of at most so many pixels are shown without smoothing

STYLE = """
:root{color-scheme:light dark;--line:#8884;--soft:#8881;--good:#2a8c4a;--bad:#c2410c}
*{box-sizing:border-box}
body{font:16px/1.5 system-ui,sans-serif;max-width:80rem;margin:0 auto;padding:1rem}
h1{font-size:1.6rem;margin:.2rem 0}h2{font-size:1.15rem;margin:2rem 0 .5rem}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
td,th{padding:.25rem .6rem;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
td:first-child,th:first-child{text-align:left;position:sticky;left:0;background:Canvas}
table.wide td,table.wide th{text-align:left;white-space:normal;overflow-wrap:anywhere}
table.wide td:first-child{overflow-wrap:normal;word-break:normal}
.verdict{padding:.5rem .8rem;border-left:.3rem solid var(--bad);background:var(--soft)}
.verdict.same{border-color:var(--good)}
.differs td{color:var(--bad)}
.buttons{display:flex;flex-wrap:wrap;gap:.4rem;margin:.6rem 0;position:sticky;top:0;background:Canvas;padding:.4rem 0}
.buttons button{font:inherit;padding:.15rem .7rem;border:1px solid var(--line);border-radius:1rem;background:none;
color:inherit;cursor:pointer}
.buttons button[aria-pressed=true]{background:SelectedItem;color:SelectedItemText}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,18rem),1fr));gap:1rem}
.pairs .cards{grid-template-columns:repeat(auto-fill,minmax(min(100%,26rem),1fr))}
.card{border:1px solid var(--line);border-radius:.5rem;padding:.7rem;display:flex;flex-direction:column;gap:.4rem}
p{overflow-wrap:anywhere}.card p{margin:0}
.card .head{display:flex;justify-content:space-between;gap:.5rem;font-size:.85rem;opacity:.8}
.models{display:grid;grid-template-columns:1fr;gap:.5rem}.pairs .models{grid-template-columns:1fr 1fr}
.pictures{display:grid;grid-template-columns:repeat(auto-fit,minmax(6rem,1fr));gap:.3rem;align-items:start}
.pictures img{width:100%;height:auto;display:block;border-radius:.25rem;border-bottom:.25rem solid #8888}
.right img{border-color:var(--good)}.wrong img{border-color:var(--bad)}
.small{image-rendering:pixelated}
.why{font-size:.85rem;opacity:.85}
dialog{border:0;padding:0;max-width:98vw;max-height:98vh;background:none}dialog::backdrop{background:#000c}
dialog img{max-width:98vw;max-height:96vh;min-width:min(90vw,32rem);object-fit:contain}
[hidden]{display:none!important}
"""
SCRIPT = """
const cards=[...document.querySelectorAll('.card')],state={tag:'',rank:''};
document.querySelectorAll('.buttons button').forEach(b=>b.onclick=()=>{
 state[b.dataset.kind]=b.dataset.value;
 document.querySelectorAll(`button[data-kind="${b.dataset.kind}"]`).forEach(o=>o.ariaPressed=o===b);
 for(const c of cards)c.hidden=(state.tag&&c.dataset.tag!==state.tag)||(state.rank&&c.dataset.rank!==state.rank);
 document.getElementById('shown').textContent=cards.filter(c=>!c.hidden).length;
});
const box=document.querySelector('dialog'),big=box.querySelector('img');
document.querySelectorAll('.pictures a').forEach(a=>a.onclick=e=>{
 e.preventDefault();const thumb=a.querySelector('img');
 big.onerror=()=>{big.onerror=null;big.src=thumb.src};big.className=thumb.className;big.src=a.href;big.alt=thumb.alt;
 box.showModal();
});
box.onclick=()=>box.close();
"""


@dataclass(frozen=True)
class ShownPicture:
    """A picture of a card: its file, relative to the page, what is said of it, and its score if it has one."""

    file: str
    caption: str
    score: float | None = None


@dataclass(frozen=True)
class Card:
    """A prompt with its pictures.

    Attributes:
        prompt: in full.
        tag: that it can be filtered by.
        rank: `best`, `worst` or "".
        score: as it is shown.
        models: name of a model, or "" -> its pictures.
    """

    prompt: str
    tag: str
    rank: str
    score: str
    models: dict[str, list[ShownPicture]]


@dataclass(frozen=True)
class Page:
    """What a page holds.

    Attributes:
        title: of the report.
        lead: sentences below it.
        scores: columns and rows of the table of scores.
        notes: sentences below that table.
        comparable: whether the scores may stand beside published ones.
        verdict: the sentence that says so.
        protocol: field, value, published value, and whether they agree; of every field.
        cards: the prompts that are shown.
        tags: that cards can be filtered by, in their order.
        number: how many prompts there are.
    """

    title: str
    lead: Sequence[str]
    scores: tuple[Sequence[str], Sequence[Sequence[str]]]
    notes: Sequence[str]
    comparable: bool
    verdict: str
    protocol: Sequence[tuple[str, str, str, bool]]
    cards: Sequence[Card]
    tags: Sequence[str]
    number: int


def escape(text: str) -> str:
    """Escape a text for HTML, quotes too."""
    return html.escape(str(text), quote=True)


def render_page(page: Page, folder: Path) -> str:
    """Render the page; it holds small copies of the pictures, and opens the files beside it.

    Args:
        page: what it holds.
        folder: that it will lie in, and that the files of pictures are relative to.
    """
    pairs = " class=pairs" if any(len(card.models) > 1 for card in page.cards) else ""
    lines = [
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>",
        f"<title>{escape(page.title)}</title><style>{STYLE}</style><body{pairs}>",
        f"<h1>{escape(page.title)}</h1>",
        *(f"<p>{escape(sentence)}</p>" for sentence in page.lead),
        render_scores(*page.scores),
        *(f"<p>{escape(note)}</p>" for note in page.notes),
        f"<p class='verdict{' same' if page.comparable else ''}'>{escape(page.verdict)}</p>",
        render_protocol(page.protocol),
        render_buttons(page),
        "<div class=cards>",
        *(render_card(card, folder) for card in page.cards),
        f"</div><dialog><img alt=''></dialog><script>{SCRIPT}</script></body></html>",
    ]
    return "\n".join(lines) + "\n"


def render_scores(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Render the table of scores, which scrolls sideways where it is too wide."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in columns)
    body = []
    for row in rows:
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in row)
        body.append(f"<tr>{cells}</tr>")
    return f"<div class=scroll><table><tr>{head}</tr>{''.join(body)}</table></div>"


def render_protocol(rows: Sequence[tuple[str, str, str, bool]]) -> str:
    """Render how the scores were reached, field by field, beside the published way."""
    if not rows:
        return ""
    lines = ["<details><summary>Protocol, field by field</summary><div class=scroll><table class=wide>"]
    lines.append("<tr><th>field</th><th>this score</th><th>published scores</th></tr>")
    for name, value, published, same in rows:
        mark = "" if same else " class=differs"
        lines.append(f"<tr{mark}><td>{escape(name)}</td><td>{escape(value)}</td><td>{escape(published)}</td></tr>")
    return "".join([*lines, "</table></div></details>"])


def render_buttons(page: Page) -> str:
    """Render the buttons that filter the cards by tag, and by whether they are among the best or the worst."""
    cards = page.cards
    lines = [f"<h2>Prompts</h2><p><span id=shown>{len(cards)}</span> shown of {page.number}, the worst first</p>"]
    tags, ranks = {card.tag for card in cards}, {card.rank for card in cards}
    for kind, name, values, least in (("tag", "all tags", page.tags, 2), ("rank", "all scores", ("best", "worst"), 1)):
        known = [value for value in values if value and value in (tags if kind == "tag" else ranks)]
        if len(known) < least:
            continue
        buttons = [f"<button data-kind={kind} data-value='' aria-pressed=true>{name}</button>"]
        for value in known:
            name = escape(value)
            buttons.append(f'<button data-kind={kind} data-value="{name}" aria-pressed=false>{name}</button>')
        lines.append(f"<div class=buttons>{''.join(buttons)}</div>")
    return "\n".join(lines)


def render_card(card: Card, folder: Path) -> str:
    """Render a prompt in full, with its pictures and what is said of them."""
    lines = [f"<article class=card data-tag=\"{escape(card.tag)}\" data-rank='{card.rank}'>"]
    lines.append(f"<div class=head><span>{escape(card.tag)}</span><span>{escape(card.score)}</span></div>")
    lines.append(f"<p>{escape(card.prompt)}</p><div class=models>")
    for name, pictures in card.models.items():
        lines.append(f"<div><div class=head>{escape(name)}</div><div class=pictures>")
        lines += [render_picture(picture, card.prompt, folder) for picture in pictures]
        lines.append("</div>")
        said = list(dict.fromkeys(picture.caption for picture in pictures if picture.caption))
        lines += [f"<p class=why>{escape(caption)}</p>" for caption in said]
        lines.append("</div>")
    return "".join([*lines, "</div></article>"])


def render_picture(picture: ShownPicture, prompt: str, folder: Path) -> str:
    """Render a small copy of a picture, which opens the file; the words "no picture" where there is none."""
    try:
        image = open_picture(folder / picture.file)
    except PictureError:
        return "<span class=why>no picture</span>"
    kind = " class=small" if max(image.size) <= SMALL else ""
    source = encode_thumbnail(image)
    mark = {1.0: " class=right", 0.0: " class=wrong"}.get(-1.0 if picture.score is None else picture.score, "")
    image_tag = f'<img{kind} loading=lazy alt="{escape(prompt)}" src="{source}">'
    return f'<a{mark} href="{quote(picture.file)}">{image_tag}</a>'


def encode_thumbnail(image: Image.Image) -> str:
    """Encode a small copy of a picture as an address that holds it: tiny ones exactly, others as JPEG."""
    buffer = io.BytesIO()
    if max(image.size) <= SMALL:
        image.save(buffer, format="PNG")
        kind = "png"
    else:
        image = image.copy()
        image.thumbnail((THUMBNAIL, THUMBNAIL))
        image.save(buffer, format="JPEG", quality=85)
        kind = "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
