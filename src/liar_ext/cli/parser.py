"""The parser of `liar`: commands in groups, help with examples, errors with the next step."""

from __future__ import annotations

import argparse
import shutil
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

from liar_ext.cli.examples import EXAMPLES, FIRST_STEPS
from liar_ext.errors import did_you_mean

USAGE = 2


class Formatter(argparse.HelpFormatter):
    """Wraps descriptions, however they were written, and leaves examples as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if text.startswith("examples:"):
            return "".join(f"{indent}{line}\n" for line in text.splitlines())
        return super()._fill_text(text, width, indent)


class Parser(argparse.ArgumentParser):
    """Errors are one line beginning `error:`, with exit code 2, and name what may be meant."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"formatter_class": Formatter, **options})

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE, f"error: {message} (see {self.prog} --help)\n")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            names = [str(name) for name in action.choices]
            says = f"invalid choice: {value!r} (choose from {', '.join(names)})"
            raise argparse.ArgumentError(action, says + did_you_mean(str(value), names))


class Root(Parser):
    """The parser of `liar` itself."""

    def __init__(self, description: str) -> None:
        super().__init__(prog="liar", description=description)
        # by group: a command and its line of help
        self.groups: dict[str, list[tuple[str, str]]] = {}

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            leaf = leaf_of(self, args or ())
            option = next((word for word in unknown if word.startswith("-")), unknown[0])
            guess = did_you_mean(option.partition("=")[0], leaf._option_string_actions)
            leaf.error(f"unrecognized arguments: {' '.join(unknown)}{guess}")
        return found

    def format_help(self) -> str:
        """Commands by what they are for."""
        show = self._get_formatter()
        show.add_usage(self.usage, self._actions, self._mutually_exclusive_groups)
        show.add_text(self.description)
        text = show.format_help()
        widest = max(len(name) for group in self.groups.values() for name, _ in group)
        for title, commands in self.groups.items():
            shown = (
                textwrap.fill(
                    line,
                    max(_width(), widest + 24),
                    initial_indent=f"  {name:{widest}}  ",
                    subsequent_indent=" " * (widest + 4),
                )
                for name, line in commands
            )
            text += f"\n{title}:\n" + "\n".join(shown) + "\n"
        return (
            f"{text}\n{_examples(FIRST_STEPS)}\n\nliar COMMAND --help says more of each; every "
            "command has --quiet and --verbose.\n"
        )


class Commands:
    """What commands add themselves to: argparse's sub-parsers, with examples, in groups."""

    def __init__(self, root: Root) -> None:
        self._root = root
        self._children = root.add_subparsers(metavar="COMMAND", required=True, parser_class=Parser)
        self._group = ""

    def group(self, title: str) -> None:
        """Commands that are added from here on belong to this group."""
        self._group = title
        self._root.groups.setdefault(title, [])

    def add_parser(self, name: str, *, help: str, **options: Any) -> Parser:
        examples = EXAMPLES.get(name, ())
        epilog = _examples(examples) if examples else None
        self._root.groups[self._group].append((name, help))
        options = {"description": help[:1].upper() + help[1:] + ".", "epilog": epilog, **options}
        parser: Parser = self._children.add_parser(name, help=help, **options)
        return parser


def add_output_options(parser: argparse.ArgumentParser) -> None:
    """`--quiet` and `--verbose`, of every command under a parser."""
    for leaf in _leaves(parser):
        group = leaf.add_argument_group("output").add_mutually_exclusive_group()
        group.add_argument(
            "-q", "--quiet", action="store_true", help="only results and errors: no progress"
        )
        group.add_argument(
            "-v",
            "--verbose",
            action="store_true",
            help="what is decided, numbers of every Site, times, and what libraries say",
        )


def leaf_of(parser: argparse.ArgumentParser, words: Sequence[str]) -> argparse.ArgumentParser:
    """The parser of the command that the words name, as far as they name one."""
    for word in words:
        children = _children(parser)
        if not children:
            break
        parser = children.get(word, parser)
    return parser


def _leaves(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    children = _children(parser)
    if not children:
        yield parser
    for child in children.values():
        yield from _leaves(child)


def _children(parser: argparse.ArgumentParser) -> Mapping[str, argparse.ArgumentParser]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found: Mapping[str, argparse.ArgumentParser] = action.choices
            return found
    return {}


def _width() -> int:
    """Of the terminal, as argparse takes it: COLUMNS, what there is, or 80."""
    return shutil.get_terminal_size().columns - 2


def _examples(examples: Sequence[tuple[str, str]]) -> str:
    widest = max(len(line) for line, _ in examples)
    rows = [f"  {line:{widest}}  # {why}" for line, why in examples]
    if max(map(len, rows)) <= _width():
        return "examples:\n" + "\n".join(rows)
    return "examples:\n" + "\n".join(f"  # {why}\n  {line}" for line, why in examples)
