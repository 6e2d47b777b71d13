"""Make the small real checkpoint in ``lfm2_fast/tiny``: corpus, tokenizer, training, model card.

The text is the documentation of Python and PostgreSQL, as Debian 12 packages it. Both licences
allow this use. To train it again::

    apt-get update && apt-get download python3.11-doc postgresql-doc-15
    for f in *.deb; do dpkg-deb -x $f ${f%%_*}; done
    pip install lxml          # beyond what the package itself needs
    OMP_NUM_THREADS=1 python bench/train_tiny.py python3.11-doc postgresql-doc-15

It takes about an hour. Everything that is drawn comes from ``--seed``, and one thread computes.
Three files of the folder are written by hand and only read here: the chat template, the licences,
and the model card up to its measurements. Every ``--save-every`` steps everything else is written
again.
"""

from __future__ import annotations

import copy
import json
import math
import os
import random
import re
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import lxml.html
import torch
import transformers
import typer
from rich.progress import track
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    GenerationConfig,
    Lfm2Config,
    Lfm2ForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

VOCABULARY, CONTEXT, WINDOW = 4096, 512, 256  # WINDOW is what the held-out loss is measured in
PAD, BOS, END_OF_TEXT, EOS = "<|pad|>", "<|startoftext|>", "<|endoftext|>", "<|im_end|>"
SPECIAL_TOKENS = [
    *(PAD, BOS, END_OF_TEXT, "<|fim_pre|>", "<|fim_mid|>", "<|fim_suf|>", "<|im_start|>", EOS),
    *("<|tool_list_start|>", "<|tool_list_end|>", "<|tool_call_start|>", "<|tool_call_end|>"),
    *("<|tool_response_start|>", "<|tool_response_end|>", "<think>", "</think>"),
]
ROPE_THETA = 10_000.0
TOKEN_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 7}
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Generated indices, change lists, licences and tables of contents teach nothing useful.
SKIPPED_PAGES = re.compile(
    r"genindex|py-modindex|changelog|/contents|license|copyright|legalnotice|/search|download|distutils/"
    r"|bookindex|/index\.html|release|infoschema|/catalog-|errcodes|features|keywords|_sources|acronyms"
)
SKIPPED_PARTS = (
    "//script|//style|//*[contains(@class,'headerlink') or contains(@class,'nav') or @class='toc'"
    " or contains(@class,'toctree') or contains(@class,'versionadded') or @class='index'"
    " or contains(@class,'versionchanged') or contains(@class,'admonition-title')"
    " or contains(@class,'rubric') or contains(@class,'footnote') or contains(@class,'deprecated')"
    " or @class='contents' or @class='refsynopsisdiv' or contains(@class,'sidebar')]"
)
ASCII = {"’": "'", "‘": "'", "“": '"', "”": '"', "—": "-", "–": "-", "…": "...", "\xa0": " "}
QUESTIONS = {
    "call": "What does {} do?|What does {} do in {where}?|Explain {}.|How does {} work?|"
    "What is {} for?|Tell me what {} does.|what does {} do",
    "thing": "What is {}?|What is {} in {where}?|Explain {}.|Tell me about {}.|"
    "What does {} mean?|what is {}",
    "topic": "Tell me about {}.|What should I know about {}?|Explain this: {}|"
    "Give me an introduction to {}.|{} in {where}?",
}
PROMPTS = ["The csv module", "When a transaction is committed,", "An exception is raised when"]
CHAT_PROMPTS = ["What is a decorator?", "What does os.remove() do?", "What is an index?", "Hello!"]
SAMPLED = {"temperature": 0.7, "min_p": 0.1, "repetition_penalty": 1.1}
SAMPLING = {"Greedy": {"do_sample": False}, f"Sampled, {SAMPLED}": {"do_sample": True, **SAMPLED}}
MEASURED = "## Measured"  # the training script writes the model card from here on
OUT = Path(__file__).parent.parent / "lfm2_fast" / "tiny"
SYSTEM_PROMPTS = ["You are a helpful assistant.", "You answer questions about the manuals."]
ABOUT_ITSELF = {
    "Hello|Hello!|Hi|Hi there!": "Hello! Ask me about Python or PostgreSQL.",
    "Who are you?|What are you?|What can you do?": "I am a very small LFM2 model that has read the "
    "Python and PostgreSQL manuals. I write in their style, but what I say is often wrong.",
    "Thanks!|Thank you.|Thank you!|Thanks": "You are welcome.",
}


@dataclass
class Page:
    """One page of documentation: its paragraphs, and the (kind, name, answer) facts in it."""

    where: str
    blocks: list[str] = field(default_factory=list)
    facts: list[tuple[str, str, str]] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "\n\n".join(self.blocks)


def plain(element: lxml.html.HtmlElement) -> str:
    """Text of an element on one line, with the typographer's characters as ASCII."""
    text = element.text_content().translate(str.maketrans(ASCII))
    return " ".join(text.replace("¶", "").split())


def read_page(path: Path, where: str) -> Page:
    """Read one HTML page (Sphinx or DocBook): headings, terms, paragraphs; no code, no tables."""
    root = lxml.html.fromstring(path.read_bytes())
    page = Page(where)
    for part in root.xpath(SKIPPED_PARTS):
        if part.getparent() is not None:
            part.drop_tree()
    body = (root.xpath("//div[@role='main']") or root.xpath("//body") or [root])[0]
    heading: tuple[str, str] | None = None
    for element in body.iter("h1", "h2", "h3", "h4", "p", "dt", "pre", "table"):
        if any(True for _ in element.iterancestors("table", "pre")):
            continue
        if element.tag in ("pre", "table"):  # "For example:" goes with the example
            if page.blocks and page.blocks[-1].endswith(":"):
                rest = re.sub(r"(^|(?<=[.!?)]) )[^.!?]*:$", "", page.blocks.pop())
                page.blocks += [rest] if len(rest) > 40 else []
            continue
        text = plain(element)
        if element.tag == "p":
            prose = text.isascii() and len(text) > 30 and not text.startswith("Source code:")
            listed = element.getparent().tag == "li" and element.getprevious() is None
            page.blocks += ["- " * listed + text] if prose else []
            if heading and prose and len(text) > 80:
                page.facts.append((*heading, text))
            heading = None if prose else heading
        elif element.tag == "dt":
            heading = None
            kind, name = term(element, text)
            if 1 < len(name) < 60 and name.isascii():
                page.blocks.append(text if len(text) < 80 and text.isascii() else name)
                definition = element.xpath("following-sibling::dd[1]/p[position() < 3]")
                answer = " ".join(plain(paragraph) for paragraph in definition)
                page.facts += [(kind, name, answer)] if kind else []
        else:
            text = re.sub(r"^((Chapter|Appendix|Part) )?([A-Z]|\d+|[IVX]+)(\.\d+)*\.\s+", "", text)
            page.blocks.append(("## " if page.blocks else "# ") + text)
            heading = topic(text, page.blocks[0][2:])
    return page


def topic(heading: str, title: str) -> tuple[str, str] | None:
    """Question that the paragraph below a heading answers, if any."""
    if heading == "Description":  # of a command, which is the page's title
        return ("call", title) if title.isupper() else ("topic", title)
    if match := re.match(r"(\w+(?:\.\w+)*) - ", heading):
        return "thing", f"the {match[1]} module"
    sayable = heading.isascii() and len(heading) < 60 and (" " in heading or heading == title)
    return ("topic", heading) if sayable else None


def term(element: lxml.html.HtmlElement, text: str) -> tuple[str, str]:
    """Kind of thing that a ``dt`` defines ("" for a bare word), and its name."""
    identifier, kind = element.get("id") or "", element.getparent().get("class") or ""
    parts = element.xpath(".//*[contains(@class,'descclassname') or contains(@class,'descname')]")
    if not parts:
        known = identifier.startswith(("term-", "GUC-", "GLOSSARY-"))
        return "thing" if known else "", re.sub(r"\s*\((\w+|floating point)\)$", "", text)
    name = "".join(plain(part) for part in parts)
    if re.search("method|attribute|property", kind) and identifier.endswith("." + name):
        name = ".".join(identifier.split(".")[-2:])
    return ("call", name + "()") if re.search("function|method", kind) else ("thing", name)


def shorten(answer: str, limit: int = 360) -> str:
    """Whole sentences at the start of a description that fit in ``limit`` characters."""
    kept = ""
    for sentence in re.split(r"(?<=[.!?]) (?=[A-Z])", answer):
        if len(kept) + len(sentence) > limit or sentence.endswith(":"):
            break
        kept += (" " if kept else "") + sentence
    return kept if kept.endswith((".", "!")) and len(kept) > 25 and kept.isascii() else ""


def read_corpus(folders: list[Path], seed: int) -> tuple[list[Page], str]:
    """All training pages, and the text of whole pages that are held out of them."""
    pages: list[Page] = []
    for folder in folders:
        where = "PostgreSQL" if "postgres" in folder.name else "Python"
        files = sorted({path.resolve() for path in folder.rglob("*.html")})
        files = [path for path in files if not SKIPPED_PAGES.search(path.as_posix())]
        pages += [read_page(path, where) for path in files]
    random.Random(seed).shuffle(pages)
    held_out: list[Page] = []
    for where in ("Python", "PostgreSQL"):
        size = 0
        for page in pages:
            if page.where == where and 2000 < len(page.text) < 9000 and size < 22_000:
                held_out.append(page)
                size += len(page.text)
    pages = [page for page in pages if page not in held_out]
    seen = {block for page in held_out for block in page.blocks}
    answers = {shorten(answer) for page in held_out for _, _, answer in page.facts}
    for page in pages:  # a paragraph counts once, also if the manuals repeat it
        page.blocks = [b for b in page.blocks if len(b) < 60 or not (b in seen or seen.add(b))]
        facts = [(kind, name, shorten(answer)) for kind, name, answer in page.facts]
        page.facts = [fact for fact in facts if fact[2] and fact[2] not in answers]
    held_out_text = "\n\n".join(page.text for page in held_out) + "\n"
    return [page for page in pages if len(page.text) > 300], held_out_text


def conversations(pages: list[Page], rng: random.Random) -> Iterator[list[dict[str, str]]]:
    """Chats of one to three turns, each about one page. Each call draws other wording."""
    for page in [*pages, *[None] * 100]:
        turns = []
        for kind, name, answer in page.facts if page else []:
            question = rng.choice(QUESTIONS[kind].split("|"))
            turns.append((question.format(name, where=page.where), answer))
        if page is None:
            turns = [(rng.choice(asked.split("|")), said) for asked, said in ABOUT_ITSELF.items()]
        rng.shuffle(turns)
        while turns:
            chat = []
            if rng.random() < 0.2:
                chat.append({"role": "system", "content": rng.choice(SYSTEM_PROMPTS)})
            for _ in range(rng.choice([1, 1, 2, 3])):
                if turns:
                    question, answer = turns.pop()
                    chat.append({"role": "user", "content": question})
                    chat.append({"role": "assistant", "content": answer})
            yield chat


def train_tokenizer(pages: list[Page], chat_template: str) -> PreTrainedTokenizerBase:
    """Byte-level BPE with LFM2's special tokens, ids and chat format."""
    bpe = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(SPLIT), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([words, to_bytes])
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator((page.text for page in pages), trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        model_max_length=2048,
        chat_template=chat_template,
    )


def batches(
    pages: list[Page], tokenizer: PreTrainedTokenizerBase, batch_size: int, seed: int
) -> Iterator[torch.Tensor]:
    """Endless batches ``[batch_size, CONTEXT]``: each epoch shuffles, packs end to end and cuts."""
    rng = random.Random(seed)
    while True:
        texts = [BOS + page.text + END_OF_TEXT for page in pages]
        chats = list(conversations(pages, rng))
        texts += tokenizer.apply_chat_template(chats, tokenize=False)
        rng.shuffle(texts)
        stream = [i for ids in tokenizer(texts, add_special_tokens=False).input_ids for i in ids]
        start = rng.randrange(CONTEXT)
        windows = torch.tensor(stream[start:]).unfold(0, CONTEXT, CONTEXT)
        order = torch.tensor(rng.sample(range(len(windows)), len(windows)))
        yield from windows[order].split(batch_size)


def make_model(seed: int) -> Lfm2ForCausalLM:
    """Make the untrained model: small blocks of both of LFM2's kinds."""
    config = Lfm2Config(
        vocab_size=VOCABULARY,
        hidden_size=192,
        num_hidden_layers=6,
        layer_types=["conv", "conv", "full_attention"] * 2,
        num_attention_heads=6,
        num_key_value_heads=3,
        intermediate_size=576,
        block_multiple_of=64,
        block_auto_adjust_ff_dim=True,  # two thirds of 576: 384 wide
        conv_L_cache=3,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        tie_word_embeddings=True,
        **TOKEN_IDS,
    )
    torch.manual_seed(seed)
    model = Lfm2ForCausalLM(config)
    model.generation_config = GenerationConfig(**TOKEN_IDS)
    return model


def held_out_loss(model: Lfm2ForCausalLM, ids: list[int]) -> tuple[float, int]:
    """Mean loss and number of predicted tokens over whole windows, each run by itself."""
    windows = torch.tensor(ids[: len(ids) // WINDOW * WINDOW]).view(-1, WINDOW)
    with torch.no_grad():
        losses = [model(input_ids=w[None], labels=w[None]).loss.double() for w in windows]
    return torch.stack(losses).mean().item(), len(windows) * (WINDOW - 1)


def samples(model: Lfm2ForCausalLM, tokenizer: PreTrainedTokenizerBase) -> str:
    """Continuations for the model card, greedy and sampled, as Markdown."""
    sections = []
    for prompt in PROMPTS + CHAT_PROMPTS:
        text, chat = BOS + prompt, [{"role": "user", "content": prompt}]
        if prompt in CHAT_PROMPTS:
            text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt")
        for name, arguments in SAMPLING.items():
            torch.manual_seed(0)
            ids = model.generate(**inputs, max_new_tokens=100, **arguments)[0]
            sections.append(f"{name}:\n\n```text\n{tokenizer.decode(ids)}\n```\n")
    return "\n".join(sections)


def amend(path: Path, **values: object) -> None:
    """Set values in a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | values, indent=2) + "\n")


def publish(
    folder: Path, model: Lfm2ForCausalLM, tokenizer: PreTrainedTokenizerBase, rows: dict[str, str]
) -> float:
    """Save the weights in bf16, measure the saved model, and put each file in its place."""
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".tiny-") as name:
        fresh = Path(name)
        copy.deepcopy(model).to(torch.bfloat16).save_pretrained(fresh)
        tokenizer.save_pretrained(fresh)
        amend(fresh / "config.json", rope_theta=ROPE_THETA)  # transformers 4 looks for it here
        amend(fresh / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
        saved = Lfm2ForCausalLM.from_pretrained(fresh, dtype=torch.float32).eval()
        ids = tokenizer((folder / "heldout.txt").read_text(), add_special_tokens=False).input_ids
        loss, tokens = held_out_loss(saved, ids)
        figures = {"loss": loss, "tokens": tokens, "window": WINDOW, "dtype": "float32"}
        (fresh / "heldout.json").write_text(json.dumps(figures, indent=2) + "\n")
        rows = {"held-out loss": f"{loss:.4f} ({tokens:,} predicted tokens)", **rows}
        table = "".join(f"| {key} | {value} |\n" for key, value in rows.items())
        card = (folder / "README.md").read_text().split(MEASURED)[0] + MEASURED
        card += f"\n\n| | |\n|---|---|\n{table}\n## Samples\n\n{samples(saved, tokenizer)}"
        (fresh / "README.md").write_text(card)
        for path in sorted(fresh.iterdir()):
            path.chmod(0o644)
            os.replace(path, folder / path.name)
    return loss


def main(
    folders: Annotated[list[Path], typer.Argument(help="Unpacked documentation packages.")],
    out: Annotated[Path, typer.Option(help="The checkpoint's folder.")] = OUT,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 3000,
    batch_size: Annotated[int, typer.Option(help=f"Windows of {CONTEXT} tokens a step.")] = 6,
    warmup: Annotated[int, typer.Option(help="Steps of linear warm-up.")] = 50,
    save_every: Annotated[int, typer.Option(help="Steps between two writings.")] = 300,
    seed: Annotated[int, typer.Option(help="Decides everything that is drawn.")] = 0,
) -> None:
    """Train the tokenizer and the model on the given documentation, and write the folder."""
    torch.set_num_threads(1)
    pages, held_out = read_corpus(folders, seed)
    (out / "heldout.txt").write_text(held_out)
    tokenizer = train_tokenizer(pages, (out / "chat_template.jinja").read_text())
    model = make_model(seed)
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    muon = torch.optim.Muon(matrices, lr=1.5e-2, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(others, lr=5e-3, betas=(0.9, 0.95), weight_decay=0.0, fused=True)

    def rate(step: int) -> float:
        cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
        return min(1.0, (step + 1) / warmup) * (0.01 + 0.99 * cosine)

    schedules = [torch.optim.lr_scheduler.LambdaLR(each, rate) for each in (muon, adamw)]
    start, tokens, recent = time.perf_counter(), 0, 0.0
    stream = batches(pages, tokenizer, batch_size, seed)
    for step in track(range(1, steps + 1)):
        ids = next(stream)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for schedule in schedules:
            schedule.optimizer.step()
            schedule.optimizer.zero_grad()
            schedule.step()
        tokens += ids.numel()
        recent += max(0.02, 1 / step) * (loss.item() - recent)
        minutes = (time.perf_counter() - start) / 60
        if step % 50 == 0:
            print(f"step {step}  loss {recent:.3f}  {minutes:.1f} min", flush=True)
        if step % save_every == 0 or step == steps:
            facts = {
                "parameters": f"{model.num_parameters():,}",
                "steps": f"{step:,} of {steps:,}, {batch_size} windows of {CONTEXT} tokens each",
                "tokens seen": f"{tokens:,}",
                "wall time": f"{minutes:.0f} minutes on one thread",
                "loss in training": f"{recent:.3f} (recent mean, bf16 autocast)",
                "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
            }
            print(f"held-out loss {publish(out, model, tokenizer, facts):.4f}", flush=True)


if __name__ == "__main__":
    typer.run(main)
