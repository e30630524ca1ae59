"""Make the demo model that ships with liar-ext: a small LLaMA trained on Python's documentation.

The text is what every CPython carries: ``pydoc_data.topics`` and the docstrings of the standard
library, read with ``ast`` (nothing is imported). Text, tokenizer, weights, log and model card are
all written by this file:

    python examples/train_demo_model.py                      # remake src/liar_ext/demo, 25 minutes
    python examples/train_demo_model.py --text-only --out d  # the two texts alone, 15 seconds
    python examples/train_demo_model.py --steps 20 --out d   # a quick look

The text depends on the Python version and the weights also on the CPU and the thread count, so
``training_log.json`` records them. The same interpreter gives the same text, byte for byte.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import math
import os
import platform
import re
import sys
import sysconfig
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from pydoc_data import topics

import tokenizers
import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

END = "<|endoftext|>"
# one format for training, evaluation and calibration: every file is documents joined by this line
SEPARATOR = f"\n{END}\n"
DEFAULT_OUT = Path(__file__).resolve().parents[1] / "src" / "liar_ext" / "demo"
PROMPT = "Return a new list"
# site-packages is not the standard library; the others are programs, tests or their fixtures
SKIPPED_FOLDERS = frozenset({"test", "tests", "idlelib", "site-packages", "__pycache__"})
# windows of held-out text that a fast check evaluates; its perplexity is logged beside the full one
QUICK_WINDOWS = 64


@dataclass(frozen=True)
class Architecture:
    """Shape of the LLaMA. Defaults: 2.82 M parameters, 5.6 MB in bfloat16."""

    vocab_size: int = 4096
    hidden_size: int = 192
    layers: int = 5
    ffn_size: int = 512
    heads: int = 8
    kv_heads: int = 4
    head_dim: int = 24
    context: int = 256

    def __post_init__(self) -> None:
        if self.kv_heads < 4 or self.heads % self.kv_heads:
            raise ValueError(
                f"kv_heads={self.kv_heads} must be at least 4 and divide heads={self.heads}"
            )
        if self.ffn_size % 64:
            raise ValueError(f"ffn_size={self.ffn_size} must be a multiple of 64")


@dataclass(frozen=True)
class Training:
    """How the weights are fitted. ``steps`` counts updates of ``batch`` windows each.

    One thread by default: sums then have one order, and on 2 cores with another job on one of them
    it ran at 6-7 k tokens/s where two threads, waiting for each other, ran at 0.3-10 k.
    ``autocast`` computes in bfloat16: 6.6 against 2.2 k tokens/s in float32 on a CPU with
    AVX512-BF16, slow on one without.
    """

    steps: int = 3000
    seed: int = 0
    batch: int = 8
    learning_rate: float = 2.5e-3
    final_learning_rate: float = 2e-5
    warmup: int = 100
    weight_decay: float = 0.5
    dropout: float = 0.1
    clip: float = 1.0
    eval_every: int = 250
    threads: int = 1
    autocast: bool = True

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "eval_every", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout={self.dropout} must lie in [0, 1)")


@dataclass(frozen=True)
class Split:
    """Sizes of the text. ``heldout_share`` of the documents is held out, by hash of the name."""

    heldout_share: float = 0.12
    heldout_bytes: int = 300_000
    calibration_bytes: int = 600_000

    def __post_init__(self) -> None:
        if not 0.0 < self.heldout_share < 1.0:
            raise ValueError(f"heldout_share={self.heldout_share} must lie in (0, 1)")


@dataclass(frozen=True)
class Document:
    """A topic of ``pydoc_data`` or a module of the standard library, as paragraphs."""

    name: str
    paragraphs: tuple[str, ...]

    @property
    def text(self) -> str:
        return "\n\n".join(self.paragraphs)


@dataclass(frozen=True)
class Corpus:
    """Disjoint documents. ``calibration`` is a part of ``train``."""

    train: tuple[Document, ...]
    heldout: tuple[Document, ...]
    calibration: tuple[Document, ...]


def topic_documents() -> Iterator[Document]:
    """Topics of ``pydoc_data``, short before long.

    Long topics quote short ones whole. With the short ones first, dropping repeated paragraphs
    leaves every passage in the topic that is about it.
    """
    for name, text in sorted(topics.topics.items(), key=lambda item: (len(item[1]), item[0])):
        yield Document(f"topic:{name}", tuple(paragraphs_of(text)))


def module_documents(stdlib: Path) -> Iterator[Document]:
    """One document per standard-library file: docstrings under their ``class``/``def`` lines."""
    for path in sorted(stdlib.rglob("*.py"), key=lambda p: p.relative_to(stdlib).as_posix()):
        relative = path.relative_to(stdlib)
        # _sysconfigdata is generated at build time: it would tie the text to one installation
        if SKIPPED_FOLDERS & set(relative.parts) or path.name.startswith("_sysconfigdata"):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError, ValueError):
            continue  # lib2to3 keeps python 2 files and files in other encodings as data
        found = tuple(docstring_paragraphs(tree))
        if found:
            yield Document(f"module:{relative.as_posix()}", found)


def docstring_paragraphs(tree: ast.Module) -> Iterator[str]:
    """Paragraphs of all docstrings in source order; the first of each carries the signature."""
    # ast.walk goes breadth first, so methods would be far from their class
    stack: list[ast.AST] = [tree]
    while stack:
        node = stack.pop()
        stack.extend(reversed(list(ast.iter_child_nodes(node))))
        if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        paragraphs = paragraphs_of(ast.get_docstring(node) or "")
        if not paragraphs:
            continue
        if isinstance(node, ast.ClassDef):
            bases = ", ".join(ast.unparse(base) for base in node.bases)
            paragraphs[0] = f"class {node.name}({bases})\n{paragraphs[0]}"
        elif not isinstance(node, ast.Module):
            paragraphs[0] = f"def {node.name}({ast.unparse(node.args)})\n{paragraphs[0]}"
        yield from paragraphs


def paragraphs_of(text: str) -> list[str]:
    """Non-empty blocks between blank lines, with tabs expanded and trailing spaces removed."""
    text = re.sub(r"[ \t]+$", "", text.expandtabs().replace("\f", "\n"), flags=re.MULTILINE)
    # a doctest that shows a separator would otherwise become one
    text = text.replace(END, "")
    return [block.strip("\n") for block in re.split(r"\n{2,}", text) if block.strip()]


def normalise(text: str) -> str:
    """Lower case, with every run of white space one space."""
    return " ".join(text.lower().split())


def fingerprints(paragraph: str) -> set[str]:
    """What two near-copies share: normalised lines of 40 characters or more, and 12-word runs."""
    lines = {line for line in map(normalise, paragraph.splitlines()) if len(line) >= 40}
    words = normalise(paragraph).split()
    return lines | {" ".join(words[i : i + 12]) for i in range(len(words) - 11)}


def unit_hash(text: str) -> float:
    """SHA-256 of ``text`` as a number in [0, 1), the same on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def without_repeats(documents: Iterable[Document]) -> list[Document]:
    """Paragraphs of 40 characters or more kept once, where first met; empty documents go."""
    seen: set[str] = set()
    kept = []
    for document in documents:
        paragraphs = []
        for paragraph in document.paragraphs:
            key = normalise(paragraph)
            if len(key) >= 40 and key in seen:
                continue
            seen.add(key)
            paragraphs.append(paragraph)
        if paragraphs:
            kept.append(Document(document.name, tuple(paragraphs)))
    return kept


def take_bytes(documents: Iterable[Document], limit: int) -> tuple[Document, ...]:
    """Documents in order, leaving out each one that would pass ``limit`` bytes in all."""
    taken, used = [], 0
    for document in documents:
        size = len((document.text + SEPARATOR).encode())
        if used + size <= limit:
            taken.append(document)
            used += size
    return tuple(taken)


def split_documents(documents: Iterable[Document], split: Split) -> Corpus:
    """Split by hash of the document name, then clear the held-out part of near-copies.

    A held-out paragraph goes if it shares one fingerprint with any training paragraph, so that the
    held-out perplexity measures no memorised passage. Held-out documents past ``heldout_bytes`` are
    used for nothing.
    """
    by_hash = sorted(without_repeats(documents), key=lambda d: (unit_hash(d.name), d.name))
    train = [d for d in by_hash if unit_hash(d.name) >= split.heldout_share]
    known = set().union(*(fingerprints(p) for d in train for p in d.paragraphs))
    heldout = []
    for document in by_hash[: len(by_hash) - len(train)]:
        fresh = tuple(p for p in document.paragraphs if known.isdisjoint(fingerprints(p)))
        if fresh:
            heldout.append(Document(document.name, fresh))
    return Corpus(
        train=tuple(train),
        heldout=take_bytes(heldout, split.heldout_bytes),
        # hash order mixes topics and modules, so a prefix is a fair sample
        calibration=take_bytes(train, split.calibration_bytes),
    )


def build_corpus(split: Split = Split()) -> Corpus:
    """The corpus of the running interpreter."""
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    return split_documents([*topic_documents(), *module_documents(stdlib)], split)


def joined(documents: Iterable[Document]) -> str:
    """Documents as one text, each closed by the separator line."""
    return "".join(document.text + SEPARATOR for document in documents)


def train_tokenizer(text: str, arch: Architecture) -> PreTrainedTokenizerFast:
    """Byte-level BPE: any text round-trips, and no token is unknown."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=arch.vocab_size,
        min_frequency=2,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.split(END), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        model_max_length=arch.context,
        clean_up_tokenization_spaces=False,
    )


def new_model(arch: Architecture, vocab_size: int) -> LlamaForCausalLM:
    """Stock LLaMA with random weights, residual outputs scaled by 1/sqrt(2 layers) as in GPT-2."""
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=arch.hidden_size,
            intermediate_size=arch.ffn_size,
            num_hidden_layers=arch.layers,
            num_attention_heads=arch.heads,
            num_key_value_heads=arch.kv_heads,
            head_dim=arch.head_dim,
            max_position_embeddings=arch.context,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=None,
            # a tenth faster than sdpa on a CPU at this size; it is not stored in config.json
            attn_implementation="eager",
        )
    )
    with torch.no_grad():
        for layer in model.model.layers:
            for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
                linear.weight.mul_((2 * arch.layers) ** -0.5)
    return model


def add_dropout(model: LlamaForCausalLM, p: float) -> None:
    """Dropout on the embedding and both residual branches, by hook: stock LLaMA has none there."""

    def drop(module: torch.nn.Module, _inputs: object, output: torch.Tensor) -> torch.Tensor:
        return F.dropout(output, p, module.training)

    sites = [model.model.embed_tokens]
    for layer in model.model.layers:
        sites += [layer.self_attn.o_proj, layer.mlp.down_proj]
    for site in sites:
        site.register_forward_hook(drop)


def token_ids(tokenizer: PreTrainedTokenizerFast, text: str) -> torch.Tensor:
    """Ids of ``text``, shape (tokens,), with separators as the end token and nothing added."""
    # the wrapper warns about texts longer than the context; the windows are cut later
    return torch.tensor(tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids)


def evaluation_windows(ids: torch.Tensor, context: int) -> torch.Tensor:
    """Consecutive windows without overlap, shape (windows, context); a shorter last one is left."""
    if len(ids) < context:
        raise ValueError(f"held-out text has {len(ids)} tokens, fewer than one window of {context}")
    return ids[: len(ids) // context * context].view(-1, context)


@torch.no_grad()
def heldout_loss(model: LlamaForCausalLM, windows: torch.Tensor, batch: int = 16) -> float:
    """Mean negative log-likelihood in nats per predicted token: ``context - 1`` per window."""
    model.eval()
    total = 0.0
    for part in windows.split(batch):
        logits = model(input_ids=part).logits[:, :-1].float()
        total += F.cross_entropy(
            logits.flatten(0, 1), part[:, 1:].flatten(), reduction="sum"
        ).item()
    return total / (windows.shape[0] * (windows.shape[1] - 1))


def training_batches(ids: torch.Tensor, context: int, config: Training) -> Iterator[torch.Tensor]:
    """Packed windows without end, shape (batch, context); each epoch starts at a new offset."""
    generator = torch.Generator().manual_seed(config.seed)
    pending = torch.empty(0, context, dtype=torch.long)
    while True:
        offset = int(torch.randint(min(context, len(ids) - context + 1), (1,), generator=generator))
        windows = evaluation_windows(ids[offset:], context)
        order = torch.randperm(len(windows), generator=generator)
        pending = torch.cat([pending, windows[order]])
        while len(pending) >= config.batch:
            yield pending[: config.batch]
            pending = pending[config.batch :]


def learning_rate(step: int, config: Training) -> float:
    """Linear warm-up, then a cosine down to ``final_learning_rate`` at the last step."""
    warmup = min(config.warmup, max(1, config.steps // 10))
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    share = (step - warmup) / max(1, config.steps - warmup)
    low, high = config.final_learning_rate, config.learning_rate
    return low + (high - low) * 0.5 * (1 + math.cos(math.pi * share))


def train(
    model: LlamaForCausalLM, ids: torch.Tensor, windows: torch.Tensor, config: Training
) -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
    """Fit ``model``; return the weights with the best held-out loss, and the loss curve."""
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": config.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ],
        betas=(0.9, 0.95),
        fused=True,
    )
    batches = training_batches(ids, windows.shape[1], config)
    best, best_state, curve, losses = math.inf, {}, [], []
    start = time.perf_counter()
    for step in range(config.steps):
        model.train()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config)
        batch = next(batches)
        with torch.autocast("cpu", torch.bfloat16, enabled=config.autocast):
            logits = model(input_ids=batch).logits[:, :-1]
        loss = F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()
        losses.append(loss.item())
        if (step + 1) % config.eval_every == 0 or step + 1 == config.steps:
            held = heldout_loss(model, windows)
            seconds = time.perf_counter() - start
            tokens = (step + 1) * batch.numel()
            point = {
                "step": step + 1,
                "epoch": round(tokens / len(ids), 2),
                "train_loss": round(sum(losses) / len(losses), 4),
                "heldout_loss": round(held, 4),
                "seconds": round(seconds, 1),
            }
            curve.append(point)
            losses.clear()
            if held < best:
                best = held
                best_state = {name: t.detach().clone() for name, t in model.state_dict().items()}
            say(
                f"step {step + 1}/{config.steps} epoch {point['epoch']} "
                f"train {point['train_loss']} held-out {point['heldout_loss']} "
                f"(ppl {math.exp(held):.2f}) {tokens / seconds:.0f} tok/s"
            )
    return best_state, curve


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def device_description() -> str:
    """Processor name, from the kernel where the platform module has none."""
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.+)", cpuinfo.read_text()) if cpuinfo.exists() else []
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores"


def text_record(documents: tuple[Document, ...]) -> dict[str, object]:
    text = joined(documents).encode()
    return {
        "documents": len(documents),
        "bytes": len(text),
        "sha256": hashlib.sha256(text).hexdigest(),
    }


def greedy_sample(folder: Path, prompt: str = PROMPT, tokens: int = 60) -> str:
    """Greedy continuation by the stock classes, as a user would call them."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    inputs = tokenizer(prompt, return_tensors="pt")
    output = model.generate(
        inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=tokens,
        do_sample=False,
        repetition_penalty=1.15,
    )
    return tokenizer.decode(output[0], skip_special_tokens=True)


def model_card(log: dict, sample: str) -> str:
    arch, result, text = log["architecture"], log["result"], log["corpus"]["train"]
    versions = log["versions"]
    shape = (
        f"{arch['layers']} layers, hidden {arch['hidden_size']}, SwiGLU {arch['ffn_size']}, "
        f"{arch['heads']} heads of {arch['head_dim']}, {arch['kv_heads']} KV heads, tied embeddings"
    )
    size = f"{result['parameters'] / 1e6:.2f} M parameters, {result['weight_bytes'] / 1e6:.2f} MB"
    training_text = (
        f"{text['documents']} documents, {text['bytes'] / 1e6:.2f} MB, {text['tokens']} tokens"
    )
    effort = (
        f"{result['tokens_seen'] / 1e6:.1f} M tokens ({result['epochs']} epochs) in "
        f"{result['wall_seconds'] / 60:.0f} minutes, {versions['device']}, "
        f"{log['training']['threads']} thread(s)"
    )
    perplexity = (
        f"{result['heldout_perplexity_bf16_weights']:.2f} as stored, "
        f"{result['heldout_perplexity_fp32']:.2f} before rounding to bfloat16"
    )
    return f"""# liar-ext demo model

A small LLaMA that lets the examples and tests of liar-ext run offline. It prunes in seconds and is
trained well enough that pruning hurts and repair helps.

| | |
|---|---|
| shape | {shape} |
| size | {size} in bfloat16 |
| tokenizer | byte-level BPE, {arch["vocab_size"]} tokens |
| context | {arch["context"]} tokens |
| training text | {training_text} |
| training | {effort} |
| held-out perplexity | {perplexity} |

Perplexity is per token over `heldout.txt`: consecutive windows of {arch["context"]} tokens, each
predicting its last {arch["context"] - 1}, computed in float32. It holds for this tokenizer alone.

## How it was made

`python examples/train_demo_model.py` wrote every file here, `../heldout.txt` and
`../calibration.txt`. The text is `pydoc_data.topics` and the docstrings of the standard library of
CPython {versions["python"]}; `training_log.json` holds configuration, seed, versions, hashes of the
texts and the loss curve. Documents (topics, modules) are split by a hash of their name. Repeated
paragraphs are kept once, and a held-out paragraph that shares a line of 40 characters or a run of
12 words with the training text is left out. `calibration.txt` is a part of the training text. In
both files a line `{END}` closes each document; the tokenizer reads it as the end token.

## Sample

Greedy, repetition penalty 1.15, prompt "{PROMPT}":

```text
{sample.strip()}
```

## Limits

It imitates the form of Python documentation; what it says is not to be trusted. The checkpoint is
the one with the best held-out loss, on the very text its perplexity is reported on, so that figure
is slightly optimistic.

## Licence

The text is part of CPython, copyright Python Software Foundation, under the PSF License Version 2
(https://docs.python.org/3/license.html), which covers `heldout.txt` and `calibration.txt` as well.
"""


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out",
        type=Path,
        default=DEFAULT_OUT,
        help="folder for model/, heldout.txt and calibration.txt; default src/liar_ext/demo",
    )
    parser.add_argument("--text-only", action="store_true", help="write the texts and stop")
    for name, kind in Training.__annotations__.items():
        default = getattr(Training, name)
        text = f"default {default}"
        flag = "--" + name.replace("_", "-")
        if kind == "bool":
            parser.add_argument(
                flag, action=argparse.BooleanOptionalAction, default=default, help=text
            )
        else:
            parser.add_argument(flag, type=type(default), default=default, help=text)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    config = Training(**{name: getattr(args, name) for name in Training.__annotations__})
    arch, split = Architecture(), Split()

    corpus = build_corpus(split)
    args.out.mkdir(parents=True, exist_ok=True)
    heldout_text = joined(corpus.heldout)
    for name, text in (("heldout", heldout_text), ("calibration", joined(corpus.calibration))):
        (args.out / f"{name}.txt").write_text(text, encoding="utf-8", newline="\n")
    records = {name: text_record(getattr(corpus, name)) for name in Corpus.__annotations__}
    say(f"text: {json.dumps(records)}")
    if args.text_only:
        return

    torch.manual_seed(config.seed)
    torch.set_num_threads(config.threads)
    torch.use_deterministic_algorithms(True)
    # filling every fresh buffer costs a tenth of the step and guards nothing here
    torch.utils.deterministic.fill_uninitialized_memory = False
    train_text = joined(corpus.train)
    tokenizer = train_tokenizer(train_text, arch)
    ids, heldout_ids = token_ids(tokenizer, train_text), token_ids(tokenizer, heldout_text)
    records["train"]["tokens"], records["heldout"]["tokens"] = len(ids), len(heldout_ids)
    windows = evaluation_windows(heldout_ids, arch.context)
    model = new_model(arch, len(tokenizer))
    add_dropout(model, config.dropout)
    say(
        f"{model.num_parameters()} parameters, {len(ids)} training tokens, "
        f"{len(windows)} held-out windows"
    )

    start = time.perf_counter()
    best_state, curve = train(model, ids, windows, config)
    wall = time.perf_counter() - start

    folder = args.out / "model"
    folder.mkdir(exist_ok=True)
    master = new_model(arch, len(tokenizer))
    master.load_state_dict(best_state)
    master_loss = heldout_loss(master, windows)
    # padding belongs to generation alone: in config.json it would freeze that row of the embedding
    master.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=0, pad_token_id=0)
    master.to(torch.bfloat16).save_pretrained(folder)
    # safetensors writes for the owner alone, which an installed package cannot use
    (folder / "model.safetensors").chmod(0o644)
    tokenizer.save_pretrained(folder)

    # what a user loads, not what was in memory: rounding and serialisation are part of the number
    stored = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens_seen = config.steps * config.batch * arch.context
    log = {
        "architecture": asdict(arch),
        "training": asdict(config),
        "split": asdict(split),
        "corpus": records,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
            "device": device_description(),
        },
        "result": {
            "parameters": stored.num_parameters(),
            "weight_bytes": (folder / "model.safetensors").stat().st_size,
            "tokens_seen": tokens_seen,
            "epochs": round(tokens_seen / len(ids), 2),
            "best_step": min(curve, key=lambda point: point["heldout_loss"])["step"],
            "heldout_windows": len(windows),
            "heldout_perplexity_fp32": math.exp(master_loss),
            "heldout_perplexity_bf16_weights": math.exp(heldout_loss(stored, windows)),
            "quick_windows": len(windows[:QUICK_WINDOWS]),
            "quick_perplexity_bf16_weights": math.exp(
                heldout_loss(stored, windows[:QUICK_WINDOWS])
            ),
            "wall_seconds": round(wall, 1),
        },
        "curve": curve,
    }
    (folder / "training_log.json").write_text(json.dumps(log, indent=2) + "\n", encoding="utf-8")
    sample = greedy_sample(folder)
    (folder / "README.md").write_text(model_card(log, sample), encoding="utf-8")
    say(f"{json.dumps(log['result'])}\n{sample}")


if __name__ == "__main__":
    main()
