"""The model's chat template: from a conversation to the text that the model reads."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mst.data.named_templates import NAMED
from mst.data.rows import Message
from mst.data.special import is_token, read_json, special_tokens
from mst.errors import DataError, ModelError
from mst.model.processor import has_processor

# For models that bring no template (base models). The role stands on a line of its own, so that
# the answer's first word is not glued to a space; the end-of-sequence token ends each answer.
PLAIN_TEMPLATE = (
    "{{ bos_token or '' }}"
    "{% for message in messages %}"
    "{{ message.role | capitalize + ':\\n' + message.content }}"
    "{{ eos_token if message.role == 'assistant' else '' }}{{ '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:\\n' }}{% endif %}"
)
PLAIN_ORIGIN = "mst's built-in plain template"


class ConversationRefused(DataError):
    """A template has refused a conversation.

    Attributes:
        reason: in the template's own words, or by the kind of what went wrong; never a text of
            the conversation.
    """

    def __init__(self, message: str, reason: str) -> None:
        """Keep the reason apart from where the template lies."""
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class ChatTemplate:
    """A template and the tokens that it may write.

    Attributes:
        source: its jinja text.
        special_tokens: "bos_token", "eos_token" … to their text.
        stop_tokens: texts of the tokens that end an assistant turn.
        origin: where it came from, for messages: a path, or `PLAIN_ORIGIN`.
        images: directory of the model's processor; None where the model reads text alone.
    """

    source: str
    special_tokens: Mapping[str, str]
    stop_tokens: tuple[str, ...]
    origin: str
    images: Path | None = None


def load_template(model_dir: Path, override: str | None = None) -> ChatTemplate:
    """Load the chat template of a model directory.

    The first of: `override`, chat_template.jinja, chat_template.json (of older processors),
    `chat_template` in tokenizer_config.json (of several named ones "default"), `PLAIN_TEMPLATE`.

    Args:
        model_dir: the model.
        override: path of a jinja file, or the name of a template: of the model's own, or `NAMED`.

    Raises:
        ModelError: when a template is missing, ambiguous or not valid jinja.
    """
    tokens = special_tokens(model_dir)
    source, origin = _source(model_dir, override)
    if source is None:
        if "eos_token" not in tokens.named:
            raise ModelError(
                f"{model_dir} has no chat template, and {PLAIN_ORIGIN} needs an end-of-sequence "
                "token, but none is named. Add 'eos_token' to tokenizer_config.json, or pass "
                "--template FILE."
            )
        source = PLAIN_TEMPLATE
    _check_syntax(source, origin)
    images = model_dir if has_processor(model_dir) else None
    return ChatTemplate(source, tokens.named, tokens.stop, origin, images)


def render(
    template: ChatTemplate,
    messages: Sequence[Message],
    add_generation_prompt: bool = False,
    tools: Sequence[Mapping[str, Any]] = (),
) -> str:
    """Render a conversation, character for character as transformers' `apply_chat_template`.

    Args:
        template: the model's template.
        messages: the conversation so far.
        add_generation_prompt: end with what the model sees before it answers.
        tools: JSON schemas of the tools that the conversation may call.

    Raises:
        ConversationRefused: the template refuses the conversation. The caller adds which row it
            was.
    """
    return render_marked(template, messages, add_generation_prompt, tools)[0]


def render_marked(
    template: ChatTemplate,
    messages: Sequence[Message],
    add_generation_prompt: bool = False,
    tools: Sequence[Mapping[str, Any]] = (),
) -> tuple[str, tuple[tuple[int, int], ...]]:
    """Render as `render` does, and say where `{% generation %}` blocks stand in the text."""
    from mst.data.limits import TemplateLimitError
    from mst.data.sandbox import TemplateRefusedError, rendered

    values = {
        **template.special_tokens,
        "messages": [_plain(message, _reads_lists(template)) for message in messages],
        "tools": list(tools) or None,
        "documents": None,
        "add_generation_prompt": add_generation_prompt,
    }
    try:
        return rendered(template.source, values)
    except TemplateLimitError as error:
        raise ModelError(
            f"the chat template in {template.origin} was stopped: {error.message}. A template "
            "takes milliseconds for a conversation; mend it, or pass another --template."
        ) from None
    except TemplateRefusedError as error:
        # The template may build its reason from the conversation; only its own words are shown.
        own_words = bool(error.message) and str(error.message) in template.source
        reason = str(error.message) if own_words else "its reason may hold the text"
    # Whatever a template does wrong with a value (TypeError, UndefinedError, ZeroDivisionError …)
    # is found out here, and the exception may quote the value.
    except Exception as error:
        reason = type(error).__name__
    roles = ", ".join(message.role for message in messages)
    raise ConversationRefused(
        f"the chat template in {template.origin} refused the conversation ({roles}): {reason}. "
        "Mend the row, or pass another --template.",
        reason,
    )


def _reads_lists(template: ChatTemplate) -> bool:
    """Return whether a template takes content as a list of parts alone, as LLaVA's does.

    One that takes text too must ask which it is: `content is string`.
    """
    return template.images is not None and "string" not in template.source


def _plain(message: Message, as_list: bool) -> dict[str, Any]:
    """Return a message as `apply_chat_template` takes it; what it doesn't have is left out."""
    plain: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.parts or as_list:
        plain["content"] = [
            {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"}
            for part in message.parts or (message.content,)
        ]
    if message.reasoning is not None:
        # transformers gives it under both names: gpt-oss and LFM2.5 read `thinking`.
        plain["reasoning_content"] = plain["thinking"] = message.reasoning
    if message.tool_calls:
        plain["tool_calls"] = list(message.tool_calls)
    if message.tool_call_id is not None:
        plain["tool_call_id"] = message.tool_call_id
    if message.name is not None:
        plain["name"] = message.name
    return plain


def _source(model_dir: Path, override: str | None) -> tuple[str | None, str]:
    """Return the template's text, or None where the model has none, and its origin."""
    if override is not None:
        return _override(model_dir, override)
    path = model_dir / "chat_template.jinja"
    if path.is_file():
        return _read(path), str(path)
    path = model_dir / "chat_template.json"
    if not isinstance(read_json(path).get("chat_template"), str):
        path = model_dir / "tokenizer_config.json"
    value = read_json(path).get("chat_template")
    if value is None:
        return None, PLAIN_ORIGIN
    if isinstance(value, str):
        return value, str(path)
    named = _own_names(model_dir)
    if "default" not in named:
        raise ModelError(
            f"{path} has several chat templates ({', '.join(sorted(named))}) and none is called "
            "'default'. Pass the name of the one you mean as --template."
        )
    return named["default"], str(path)


def _override(model_dir: Path, override: str) -> tuple[str, str]:
    """Return the template that `--template` names: a file, one of the model's own, or of ours."""
    path = Path(override).expanduser()
    if path.is_file():
        return _read(path), str(path)
    own = _own_names(model_dir)
    if override in own:
        return own[override], f"{model_dir / 'tokenizer_config.json'} ({override})"
    if override in NAMED:
        source, end = NAMED[override]
        # A config may name an end that the vocabulary lacks.
        if end not in special_tokens(model_dir).stop or not is_token(model_dir, end):
            raise ModelError(
                f"--template {override} ends its turns with {end}, which is no end-of-turn token "
                f"of the model in {model_dir}: it would never learn to stop. Pass the model's own "
                "template, or add the token to its tokenizer."
            )
        return source, f"mst's template {override}"
    known = sorted({*own, *NAMED})
    near = difflib.get_close_matches(override, known, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise ModelError(
        f"--template {override}: there is no such file, and no template of that name (known: "
        f"{', '.join(known)}).{hint} Pass the path of a jinja file, or leave it out to use the "
        "model's own."
    )


def _own_names(model_dir: Path) -> dict[str, str]:
    """Return the templates that a model's files have by name."""
    value = read_json(model_dir / "tokenizer_config.json").get("chat_template")
    if not isinstance(value, list):
        return {}
    return {str(entry["name"]): str(entry["template"]) for entry in value}


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(
            f"The chat template {path} cannot be read as UTF-8 text ({type(error).__name__}). "
            "Pass another --template."
        ) from None


def _check_syntax(source: str, origin: str) -> None:
    from jinja2 import TemplateSyntaxError

    from mst.data.sandbox import compiled

    try:
        compiled(source)
    except TemplateSyntaxError as error:
        raise ModelError(
            f"The chat template in {origin} is not valid jinja: line {error.lineno}: "
            f"{error.message}. Mend it, or pass another --template."
        ) from None
