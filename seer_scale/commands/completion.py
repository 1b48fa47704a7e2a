"""Prints a completion script, for example `seer-scale completion bash > FILE`.

It completes commands, options, recipes, hardware profiles, tasks, presets and trunks, and the keys
`section.key=` with the values that a key takes.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Mapping, Sequence
from importlib import import_module

from seer_scale.config import schema
from seer_scale.config.argument_types import command_parser
from seer_scale.config.shipped import RECIPES, SHIPPED

Words = Mapping[str, Sequence[str] | Mapping[str, Sequence[str]]]
"""Words by the name of a list; keys have lists of their own, of the values that they take."""

FILES = {"recipes": "yaml", "profiles": "yaml", "ds_configs": "json"}
"""Lists whose arguments also take files, with the files' suffix."""

EXAMPLES = """\
  mkdir -p ~/.local/share/bash-completion/completions         # bash: then open a new shell
  seer-scale completion bash > ~/.local/share/bash-completion/completions/seer-scale
  seer-scale completion zsh > "${fpath[1]}/_seer-scale"       # then restart zsh
  seer-scale completion fish > ~/.config/fish/completions/seer-scale.fish
"""
# Words by what an argument is called.
LISTS = {
    "--recipe": "recipes",
    "--run": "recipes",
    "--hardware": "profiles",
    "--preset": "presets",
    "--trunk": "trunks",
    "--deepspeed_config": "ds_configs",
    "task": "tasks",
}
KEYS = ("pretrain", "plan", "doctor", "evaluate")  # commands that take keys, not as an argument


def parser() -> argparse.ArgumentParser:
    """Builds the argument parser."""
    parser = command_parser(__doc__, EXAMPLES)
    parser.add_argument("shell", choices=("bash", "zsh", "fish"))
    return parser


def main(argv: list[str]) -> int:
    """Runs the command; returns 0."""
    arguments = parser().parse_args(argv)
    import shtab

    preamble = _functions(arguments.shell, _words())
    script = shtab.complete(whole_parser(), arguments.shell, preamble=preamble)
    print(script + _ending(arguments.shell))
    return 0


def whole_parser() -> argparse.ArgumentParser:
    """Builds the parser of `seer-scale` with all commands, for shtab."""
    from seer_scale.commands.run import COMMANDS

    whole = argparse.ArgumentParser(prog="seer-scale", description="Pretraining of RegNets.")
    whole.add_argument("--version", action="store_true", help="print the version")
    commands = whole.add_subparsers(dest="command")
    for name, about in COMMANDS.items():
        own = import_module(f"seer_scale.commands.{name}").parser()
        if name in KEYS:
            own.add_argument("keys", nargs="*", metavar="section.key=value", help="keys")
        _complete(own, "options" if name == "evaluate" else "keys")
        commands.add_parser(name, help=about, description=about, parents=[own], add_help=False)
    return whole


def _complete(parser: argparse.ArgumentParser, keys: str) -> None:
    """Tells shtab which function completes which argument, also of commands within a command.

    Args:
        parser: parser of a command; its arguments are changed.
        keys: list of the keys that the command takes.
    """
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                _complete(inner, keys)
        for name in (*action.option_strings, action.dest):
            listed = keys if name in ("keys", "words") else LISTS.get(name)
            if listed:
                action.complete = _calls(listed)  # type: ignore[attr-defined]


def _words() -> Words:
    """Collects all words; imports torch for the names of trunks."""
    from seer_scale.commands.evaluate import TASKS
    from seer_scale.evaluation.options import OPTIONS
    from seer_scale.evaluation.presets import PRESETS
    from seer_scale.models.regnet import TRUNKS
    from seer_scale.objectives.build import objective_names
    from seer_scale.performance.hardware import names

    keys = {key: _values(described) for key, described in schema.key_schemas().items()}
    options = {
        key: _values(described)
        for task in TASKS
        for key, described in schema.keys_of(OPTIONS[task]).items()
    }
    return {
        "recipes": sorted(path.stem for path in RECIPES.glob("*.yaml")),
        "profiles": names(),
        "presets": sorted(PRESETS),
        "trunks": list(TRUNKS),
        "ds_configs": sorted(f"ds_configs/{f.name}" for f in SHIPPED.glob("ds_configs/*.json")),
        "tasks": list(TASKS),
        "keys": keys | {"model.trunk": list(TRUNKS), "objective.name": objective_names()},
        "options": options,
    }


def _values(described: schema.Schema) -> list[str]:
    """The values of a key that takes few; empty if it takes any number or text."""
    found: list[str] = []
    for choice in described.get("anyOf", [described]):
        found += map(str, choice.get("enum", ()))
        if choice.get("type") == "boolean":
            found += ["true", "false"]
    return found


def _calls(name: str) -> dict[str, str]:
    """Names the shell functions that shtab calls for a list, by shell."""
    function = f"_seer_scale_{name}"
    return {"bash": function, "zsh": function, "fish": f"({function})"}


def _functions(shell: str, words: Words) -> str:
    """The functions that `_calls` names, for one shell."""
    write = {"bash": _bash, "zsh": _zsh, "fish": _fish}[shell]
    return "\n".join(write(name, listed) for name, listed in words.items())


def _ending(shell: str) -> str:
    """Text after shtab's script: in bash, no space follows a key and its equals sign."""
    if shell != "bash":
        return ""
    return """
_seer_scale_complete() {
  _shtab_seer_scale "$@"
  [[ ${#COMPREPLY[@]} = 1 && ${COMPREPLY[0]} == *= ]] && compopt -o nospace 2>/dev/null
  return 0
}
complete -o bashdefault -F _seer_scale_complete seer-scale
"""


def _bash(name: str, listed: Sequence[str] | Mapping[str, Sequence[str]]) -> str:
    lines = [f"_seer_scale_{name}() {{"]
    if isinstance(listed, Mapping):
        # The shell cuts a word at `=`: what is completed then is the value alone.
        lines += [
            '  local key="" value="$1"',
            '  if [[ "$1" == "=" ]]; then key="${COMP_WORDS[COMP_CWORD-1]}"; value=""',
            '  elif [[ "${COMP_WORDS[COMP_CWORD-1]}" == "=" ]]; then '
            'key="${COMP_WORDS[COMP_CWORD-2]}"; fi',
            '  case "$key" in',
            f'    "") compgen -W "{" ".join(f"{key}=" for key in listed)}" -- "$value";;',
            *(
                f'    {key}) compgen -W "{" ".join(values)}" -- "$value";;'
                for key, values in listed.items()
                if values
            ),
            "  esac",
        ]
    else:
        lines.append(f'  compgen -W "{" ".join(listed)}" -- "$1"')
        if name in FILES:
            lines.append(f"  compgen -f -X '!*.{FILES[name]}' -- \"$1\"")
            lines.append('  if [[ "$1" == */* ]]; then compgen -d -S / -- "$1"; fi')
    return "\n".join([*lines, "}"])


def _zsh(name: str, listed: Sequence[str] | Mapping[str, Sequence[str]]) -> str:
    lines = [f"_seer_scale_{name}() {{"]
    if isinstance(listed, Mapping):
        lines += [
            "  local key=${PREFIX%%=*}",
            "  if [[ $PREFIX != *=* ]]; then",
            f"    compadd -S '' -- {' '.join(f'{key}=' for key in listed)}; return",
            "  fi",
            "  compset -P '*='",
            "  case $key in",
            *(f"    {key}) compadd -- {' '.join(v)};;" for key, v in listed.items() if v),
            "  esac",
        ]
    else:
        lines.append(f"  compadd -- {shlex.join(listed)}")
        if name in FILES:
            lines.append(f"  _files -g '*.{FILES[name]}'")
    return "\n".join([*lines, "}"])


def _fish(name: str, listed: Sequence[str] | Mapping[str, Sequence[str]]) -> str:
    if isinstance(listed, Mapping):
        offered = [f"{key}={value}" for key, values in listed.items() for value in values or [""]]
        offered = [*(f"{key}=" for key, values in listed.items() if values), *offered]
    else:
        offered = list(listed)
    lines = [f"function _seer_scale_{name}", f"  printf '%s\\n' {shlex.join(offered)}"]
    if name in FILES:
        lines.append(f"  __fish_complete_suffix .{FILES[name]}")
    return "\n".join([*lines, "end"])
