"""``spimpi completion``: scripts that let bash, zsh and fish complete its command line.

They are made of the parser itself. In each a loop over the words finds the command that is
being typed ("spimpi trace show"); its options, their values and its words then stand beside it.
"""

import argparse
from dataclasses import dataclass

from spimpi.cli.registry import subcommand

FILES = ("FILE", "DIR", "RUN", "MODEL", "MANIFEST", "OUT", "HTML", "A", "B")  # metavars of paths
SHELLS = ("bash", "zsh", "fish")


@dataclass(frozen=True)
class Option:
    """An option, or (without names) a word by its place. ``values``: None takes none."""

    names: tuple[str, ...]
    help: str
    values: tuple[str, ...] | None
    files: bool


@dataclass(frozen=True)
class Command:
    """A command as it is typed, its options and words, its subcommands with their help."""

    name: str
    options: tuple[Option, ...]
    words: tuple[Option, ...]
    commands: dict[str, str]

    @property
    def named(self) -> list[str]:
        """What may stand here first: subcommands, and words that are chosen from a list."""
        return [*self.commands, *(value for word in self.words for value in word.values or ())]

    @property
    def takes_files(self) -> bool:
        return any(word.files for word in self.words)


def add_arguments(parser) -> None:
    parser.add_argument("shell", choices=SHELLS, metavar="SHELL", help="bash, zsh or fish")


@subcommand("completion", "print a script that completes this command line in a shell", add_arguments)
def completion(args) -> int:
    from spimpi.cli import build_parser

    print({"bash": bash, "zsh": zsh, "fish": fish}[args.shell](commands_of(build_parser())), end="")
    return 0


def commands_of(parser, name: str = "spimpi") -> list[Command]:
    """A parser's command and all below it."""
    options, words, below, helps = [], [], [], {}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            told = {choice.dest: choice.help or "" for choice in action._choices_actions}
            helps = {sub: told.get(sub, "") for sub in action.choices}
            for sub, its in action.choices.items():
                below += commands_of(its, f"{name} {sub}")
        elif action.help != argparse.SUPPRESS:
            (options if action.option_strings else words).append(_option(action))
    return [Command(name, tuple(options), tuple(words), helps), *below]


def _option(action) -> Option:
    values = None
    if action.nargs != 0:
        values = tuple(map(str, action.choices or getattr(action, "completed_by", ())))
    metavar = action.metavar if isinstance(action.metavar, str) else action.dest.upper()
    files = values == () and metavar in FILES
    return Option(tuple(action.option_strings), action.help or "", values, files)


def _find(commands, case, esac) -> str:
    """The names of all commands but the first, as patterns of a case."""
    return case + " | ".join(f'"{command.name}"' for command in commands[1:]) + esac


def bash(commands) -> str:
    cases = "".join(_bash_case(command) for command in commands)
    found = _find(commands, "            ", ') command+=" $word" ;;')
    return f"""# bash completion for spimpi: source it, or put it into ~/.local/share/bash-completion/completions/spimpi
_spimpi() {{
    local cur=${{COMP_WORDS[COMP_CWORD]}} prev=${{COMP_WORDS[COMP_CWORD - 1]}}
    local command=spimpi word values='' files=''
    for word in "${{COMP_WORDS[@]:1:COMP_CWORD-1}}"; do
        case "$command $word" in
{found}
        esac
    done
    case "$command: $prev" in
{cases}    esac
    COMPREPLY=()
    if [[ -n $values ]]; then mapfile -t COMPREPLY < <(compgen -W "$values" -- "$cur"); fi
    if [[ -n $files ]]; then mapfile -t -O "${{#COMPREPLY[@]}}" COMPREPLY < <(compgen -f -- "$cur"); fi
}}
complete -o filenames -F _spimpi spimpi
"""


def _bash_case(command) -> str:
    lines = []
    for option in command.options:
        if option.values is not None:
            names = " | ".join(f'"{command.name}: {name}"' for name in option.names)
            lines.append(f"        {names}) {_set(option.values, option.files)} ;;\n")
    names = [name for option in command.options for name in option.names]
    lines.append(
        f'        "{command.name}: "*)\n'
        f"            if [[ $cur == -* ]]; then {_set(names, False)}\n"
        f"            else {_set(command.named, command.takes_files)}; fi ;;\n"
    )
    return "".join(lines)


def _set(values, files) -> str:
    return f"values={_quoted(' '.join(values))} files={'yes' if files else _quoted('')}"


def zsh(commands) -> str:
    cases = "".join(_zsh_case(command) for command in commands)
    found = _find(commands, "            ", ') command+=" $word" ;;')
    return f"""#compdef spimpi
# zsh completion for spimpi: put it into a folder of $fpath, as _spimpi
_spimpi() {{
    local cur=${{words[CURRENT]}} prev=${{words[CURRENT - 1]}} command=spimpi word
    local -a values
    local files=''
    for word in "${{(@)words[2,CURRENT-1]}}"; do
        case "$command $word" in
{found}
        esac
    done
    case "$command: $prev" in
{cases}    esac
    if (( ${{#values}} )); then _describe -t values value values; fi
    if [[ -n $files ]]; then _files; fi
}}
if [[ $zsh_eval_context[-1] == loadautofunc ]]; then _spimpi "$@"; else compdef _spimpi spimpi; fi
"""


def _zsh_case(command) -> str:
    lines = []
    for option in command.options:
        if option.values is not None:
            names = " | ".join(f'"{command.name}: {name}"' for name in option.names)
            chosen = _zsh_set(dict.fromkeys(option.values, ""), option.files)
            lines.append(f"        {names}) {chosen} ;;\n")
    names = {name: option.help for option in command.options for name in option.names}
    words = dict.fromkeys(command.named, "") | command.commands
    lines.append(
        f'        "{command.name}: "*)\n'
        f"            if [[ $cur == -* ]]; then {_zsh_set(names, False)}\n"
        f"            else {_zsh_set(words, command.takes_files)}; fi ;;\n"
    )
    return "".join(lines)


def _zsh_set(values: dict, files) -> str:
    entries = (_quoted(f"{value}:{text}" if text else value) for value, text in values.items())
    return f"values=({' '.join(entries)}) files={'yes' if files else _quoted('')}"


def fish(commands) -> str:
    names = " ".join(f"'{command.name}'" for command in commands[1:])
    lines = "".join(_fish_lines(command) for command in commands)
    return f"""# fish completion for spimpi: put it into ~/.config/fish/completions/spimpi.fish
function __spimpi_command
    set -l command spimpi
    for word in (commandline -opc)[2..-1]
        if contains -- "$command $word" {names}
            set command "$command $word"
        end
    end
    echo $command
end
complete -c spimpi -f
{lines}"""


def _fish_lines(command) -> str:
    start = f"complete -c spimpi -n 'test (__spimpi_command) = \"{command.name}\"'"
    lines = [f"{start} -a {name} -d {_fish_quoted(text)}\n" for name, text in command.commands.items()]
    for word in command.words:
        if word.values:
            lines.append(f"{start} -a '{' '.join(word.values)}'\n")
        elif word.files:
            lines.append(f"{start} -F\n")
    for option in command.options:
        names = "".join(f" -l {n[2:]}" if n.startswith("--") else f" -s {n[1:]}" for n in option.names)
        value = "" if option.values is None else " -r"
        if option.values:
            value = f" -x -a '{' '.join(option.values)}'"
        elif option.files:
            value = " -r -F"
        lines.append(f"{start}{names}{value} -d {_fish_quoted(option.help)}\n")
    return "".join(lines)


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''").replace("\n", " ") + "'"


def _fish_quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", " ") + "'"
