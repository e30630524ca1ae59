"""Examples at the end of each command's help. A test parses every one of them."""

from __future__ import annotations

Example = tuple[str, str]

# of `liar --help`: a command, and what it is for
FIRST_STEPS: tuple[Example, ...] = (
    ("liar demo", "the main job on a model that is here already"),
    ("liar plan llama --sparsity 0.3 --calibration wiki.txt", "what it would need"),
    ("liar prune llama --out small --calibration wiki.txt", "make it smaller"),
    ("liar eval small --text held-out.txt", "how good it is now"),
    ("liar report small", "a page to send to others"),
)
EXAMPLES: dict[str, tuple[Example, ...]] = {
    "prune": (
        (
            "liar prune llama --out small --sparsity 0.3 --calibration wiki.txt",
            "30 % of the FFN neurons; loads in stock transformers",
        ),
        (
            "liar prune llama --out small --preset best --sparsity 0.5 --target ffn,heads "
            "--calibration wiki.txt",
            "the best that there is for this size; takes longer",
        ),
        ("liar prune llama --out small --recipe recipe.json --resume", "after a crash"),
        ("liar prune llama --out shallow --drop-layers 20-27", "from file to file, no repair"),
    ),
    "export": (
        ("liar export small --check", "which engines load it, and why others do not"),
        ("liar export small --out small-onnx --format onnx", "for ONNX Runtime"),
        ("liar export small --out small-gguf --format gguf --converter llama.cpp", "for llama.cpp"),
        ("liar export uneven --out even --format padded", "one width for all layers, by zeros"),
    ),
    "merge": (
        ("liar merge llama --out merged --drop 8 --calibration wiki.txt", "eight layers fewer"),
        ("liar merge llama --out merged --threshold 0.7 --calibration wiki.txt --dry-run", "look"),
    ),
    "replace": (
        ("liar replace llama --out less --drop 8 --train wiki.txt --steps 500", "choose where"),
        ("liar replace llama --out less --window 20-28 --train wiki.txt --steps 500", "say where"),
    ),
    "grow": (
        ("liar grow llama --out deeper --layers 4", "behind the last layers, not trained"),
        ("liar grow llama --out deeper --insert 15-30 --train wiki.txt --steps 200", "trained"),
    ),
    "recover": (
        ("liar recover small --out better --train wiki.txt --steps 200", "the last layers"),
        ("liar recover small --out better --method lora --train qa.jsonl --steps 200", "adapters"),
    ),
    "fuse": (
        ("liar fuse resnet --out fused --images images --time 0.6", "60 % of the dense time"),
    ),
    "batch": (
        ("liar batch jobs.jsonl --calibration wiki.txt", "one job a line"),
        ("liar batch jobs.jsonl --resume", "go on with what was interrupted"),
    ),
    "compare": (
        (
            "liar compare llama --out grid --sparsities 0.3,0.5 --criteria wanda,flap "
            "--calibration wiki.txt --eval text=held-out.txt",
            "four models, one table",
        ),
    ),
    "plan": (
        ("liar plan llama --sparsity 0.3 --calibration wiki.txt", "on this machine"),
        ("liar plan llama --sparsity 0.3 --device-memory 80GiB", "on a GPU that is not here"),
    ),
    "layers": (
        ("liar layers llama --calibration wiki.txt", "how much each layer does"),
        ("liar layers llama --calibration wiki.txt --measures angle --spans 2,4", "spans"),
    ),
    "trace": (("liar trace llama", "config.json is enough"),),
    "eval": (
        ("liar eval small --text held-out.txt", "perplexity"),
        ("liar eval small --text wikitext2=wiki.test.raw --dense llama", "beside the dense model"),
        ("liar eval small --text held-out.txt --against llama", "divergence from it"),
        ("liar eval small --text held-out.txt --json > small.json", "for liar report --eval"),
        ("liar eval encoder --stsb sts-dev.csv", "rank correlation of an encoder"),
        ("liar eval classifier --glue sst2=dev.tsv --dense whole", "GLUE"),
        ("liar eval reader --squad dev-v2.0.json --dense whole", "SQuAD"),
        ("liar eval summariser --pairs held-out.jsonl --dense whole", "an encoder-decoder"),
        ("liar eval small --lm-eval piqa,arc_easy --dense llama", "tasks of lm-eval"),
        ("liar eval small --stability questions.jsonl --dense llama", "are answers the same?"),
    ),
    "bench": (
        ("liar bench gram", "the Gram matrix beside x.T @ x"),
        ("liar bench latency llama --out table.json", "for --budget latency"),
        ("liar bench serve llama small --json serve.json", "how fast they answer"),
        ("liar bench serve llama llama@0.5 --random", "shapes alone, without weights"),
    ),
    "demo": (("liar demo --out models", "keep the pruned models"),),
    "report": (
        ("liar report small", "small/report.html"),
        ("liar report small --eval dense.json --eval small.json", "with quality"),
        ('liar report small --dense llama --prompt "Once upon a time"', "with examples"),
        ("liar report small --serve serve.json", "with speed and memory"),
        ("liar report small smaller --compare grid --out all.html", "side by side"),
    ),
    "env": (("liar env --json", "for an issue"),),
    "completion": (
        ('eval "$(liar completion bash)"', "in ~/.bashrc"),
        ('eval "$(liar completion zsh)"', "in ~/.zshrc, behind compinit"),
        ("liar completion fish | source", "in ~/.config/fish/config.fish"),
    ),
}
