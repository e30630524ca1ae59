#!/usr/bin/env bash
# a real run in tmux, what its screen showed at the end, as a picture: docs/images/terminal.sh OUT.png
# needs `liar` on PATH, tmux and Chromium; the folder it works in is removed
set -euo pipefail
out=$(realpath "$1"); here=$(dirname "$(realpath "$0")"); work=$(mktemp -d)
trap 'tmux kill-session -t liar-shot 2>/dev/null || true; rm -rf "$work"' EXIT
cp -r "$(python -c 'import liar_ext.demo as d; print(d.MODEL.parent)')" "$work/demo"
cd "$work"; mv demo/model llama; mv demo/calibration.txt wiki.txt
# the prompt comes back when the command is done
printf "PS1='$ '; PROMPT_COMMAND='[ -e small ] && touch done; touch ready'\n" > rc
tmux new-session -d -s liar-shot -x 100 -y 40 "TERM=xterm-256color bash --rcfile rc -i"
until [ -e ready ]; do sleep 0.2; done; sleep 0.5
tmux send-keys -t liar-shot "liar prune llama --out small --target ffn,heads --calibration wiki.txt --seq-len 256" Enter
until [ -e done ]; do sleep 0.5; done; sleep 0.5
tmux capture-pane -t liar-shot -e -p > screen.ansi
python - <<'P'
import re
from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text
lines = open("screen.ansi", encoding="utf-8").read().rstrip().splitlines()
# without the prompt that waits for the next command
console = Console(record=True, width=100, file=open("/dev/null", "w"), force_terminal=True)
console.print(Text.from_ansi("\n".join(lines[:-1] if lines[-1].strip() == "$" else lines)))
svg = console.export_svg(title="liar prune", theme=MONOKAI)
# fonts of this machine: nothing is fetched
svg = re.sub(r"@font-face \{.*?\}", "", svg, flags=re.S).replace("Fira Code", "DejaVu Sans Mono")
width, height = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg).groups()
open("page.html", "w").write(f"<body style='margin:0'>{svg}</body>")
open("size", "w").write(f"{int(float(width)) + 1} {int(float(height)) + 1}\n")
P
read -r width height < size
python "$here/shoot.py" page.html "$out" "$width" "$height"
