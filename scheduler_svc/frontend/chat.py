"""Chat templates: a conversation becomes the text that the model was trained on.

The environment is that of transformers' `apply_chat_template` (jinja2 sandbox, the same extensions, filters
and globals), so that text and token ids are equal. Knows nothing of tokenization.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from scheduler_svc.checkpoint import CheckpointError

_TEMPLATE_FILE = "chat_template.jinja"


class TemplateFailure(Exception):  # noqa: N818 - of the conversation as often as of the template
    """The template does not take this conversation; the message is its own words."""


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a conversation."""

    role: str
    content: str


class ChatTemplate:
    """A compiled template. Raises `jinja2.TemplateError` where `source` is none."""

    def __init__(self, source: str, special_tokens: dict[str, str]) -> None:
        """`special_tokens`: by the name under which templates know them, as "eos_token"."""
        self._template = _environment().from_string(source)
        self._special_tokens = special_tokens

    def render(self, messages: Sequence[Message]) -> str:
        """The text of the conversation and the start of the assistant's turn. Raises `TemplateFailure`."""
        try:
            return self._template.render(
                **self._special_tokens,
                messages=[asdict(message) for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=True,
            )
        except jinja2.TemplateError as error:
            raise TemplateFailure(error.message or type(error).__name__) from error
        except (TypeError, ValueError, ArithmeticError, LookupError, RecursionError) as error:
            raise TemplateFailure("the model's chat template does not take this conversation") from error


def special_tokens(tokenizer_config: dict[str, Any]) -> dict[str, str]:
    """The named special tokens of tokenizer_config.json: {"eos_token": "</s>", …}."""
    tokens = {}
    for name, value in tokenizer_config.items():
        text = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(text, str):
            tokens[name] = text
    return tokens


def load(model: Path, tokenizer_config: dict[str, Any]) -> ChatTemplate | None:
    """The checkpoint's default template, None where it has none. Raises `CheckpointError`."""
    file = model / _TEMPLATE_FILE
    try:
        source = file.read_text(encoding="utf-8") if file.is_file() else None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file}: {error}") from error
    if source is None:
        file = model / "tokenizer_config.json"
        source = _configured(file, tokenizer_config.get("chat_template"))
    if source is None:
        return None
    try:
        return ChatTemplate(source, special_tokens(tokenizer_config))
    except jinja2.TemplateError as error:
        raise CheckpointError(f"{file}: chat template: {error.message}") from error


def _configured(file: Path, value: Any) -> str | None:
    """The template in tokenizer_config.json: absent, a text, or a list of named ones, then "default"."""
    if value is None or isinstance(value, str):
        return value
    try:
        named = {entry["name"]: entry["template"] for entry in value}
    except (TypeError, KeyError):
        raise CheckpointError(f"{file}: chat_template: neither a text nor a list of named ones") from None
    source = named.get("default")
    if not isinstance(source, str | None):
        raise CheckpointError(f"{file}: chat_template: the default one is no text")
    return source


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    environment.globals["dict"] = _Dict()
    environment.globals["namespace"] = _Namespace
    return environment


class _Generation(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}` marks what the assistant said; rendering passes it through."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_pass"), [], [], body).set_lineno(line)

    def _pass(self, caller: Callable[[], str]) -> str:
        return caller()


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """jinja2's own escapes HTML, which no model was trained on."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


class _Dict:
    """What templates may do with `dict`: call it. The type itself would open doors."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(jinja2.utils.Namespace):
    """A namespace that takes no underscored names: those lead to the interpreter's insides."""

    # No named self: it may be one of the names.
    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *rest = args
        values = dict(*rest, **kwargs)
        for name in values:
            _check_name(name)
        jinja2.utils.Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace takes no name that begins with _: {name!r}")
