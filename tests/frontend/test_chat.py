"""Chat templates: text and ids equal to those of transformers, and what templates may not do."""

import asyncio

import pytest

from scheduler_svc import checkpoint
from scheduler_svc.checkpoint import CheckpointError
from scheduler_svc.frontend import chat, tokenizer
from scheduler_svc.frontend.chat import ChatTemplate, Message, TemplateFailure
from tests.support.checkpoints import CHATML, write_checkpoint
from tests.support.tokenizers_zoo import byte_level, sentencepiece

LLAMA = """\
{{ bos_token }}{% for message in messages %}
    {% if message['role'] == 'user' %}
        [INST] {{ message['content'] | trim }} [/INST]
    {% elif message['role'] == 'system' %}
        {% set ns = namespace(found=true) %}<<{{ ns.found }}>> {{ message['content'] | upper }}
    {% else %}
        {% generation %}{{ message['content'] }}{{ eos_token }}{% endgeneration %}
    {% endif %}
{% endfor %}
"""
TOOLS = """\
{%- if tools %}{{ tools | tojson }}{% endif -%}
{%- for m in messages -%}
{%- if loop.index0 > 2 %}{% break %}{% endif -%}
{{ m | tojson }}{{ m | tojson(indent=2) }}{{ dict(a=1) | tojson }}{{ strftime_now("%Y") }}
{{- m.content.split("<b>")[-1] | safe }}
{%- endfor -%}
{{ pad_token is defined }} {{ documents is none }} {{ add_generation_prompt }}"""
TEMPLATES = {"chatml": CHATML, "llama": LLAMA, "tools": TOOLS}
CONVERSATIONS = [
    [Message("user", "hello")],
    [Message("system", "be <brief> & 'kind'"), Message("user", " a\n\nb "), Message("assistant", "né 漢 🎻")],
    [Message("user", "{{ 7 * 7 }} {% raw %}"), *[Message("tool", '{"x": 1}')] * 4],
    [Message("user", "<|end|> is a special token, typed by a user")],
]


@pytest.fixture(scope="module", params=["byte_level", "sentencepiece"])
def tokenizer_made(request):
    return {"byte_level": byte_level, "sentencepiece": sentencepiece}[request.param]()


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("where", ["file", "tokenizer_config", "named"])
def test_equal_to_transformers(tmp_path, tokenizer_made, template, where):
    transformers = pytest.importorskip("transformers")
    source = TEMPLATES[template]
    config: dict[str, object] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": {"content": "<think>", "lstrip": False, "__type": "AddedToken"},
        "eos_token": "<|end|>",
        "pad_token": None,
    }
    if where == "tokenizer_config":
        config["chat_template"] = source
    elif where == "named":
        other = {"name": "tool_use", "template": "never"}
        config["chat_template"] = [other, {"name": "default", "template": source}]
    path = write_checkpoint(
        tmp_path / "model",
        tokenizer=tokenizer_made,
        tokenizer_config=config,
        chat_template=source if where == "file" else None,
    )
    theirs = transformers.AutoTokenizer.from_pretrained(path)
    found = checkpoint.load(path)
    ours = chat.load(path, found.tokenizer_config)
    assert ours is not None
    codec = tokenizer.load(found)
    for messages in CONVERSATIONS:
        plain = [{"role": m.role, "content": m.content} for m in messages]
        text = ours.render(messages)
        assert text == theirs.apply_chat_template(plain, tokenize=False, add_generation_prompt=True)
        ids = asyncio.run(codec.encode(text, add_special_tokens=False))
        assert ids == theirs.apply_chat_template(plain, add_generation_prompt=True, return_dict=False)


def test_demo_model_equal_to_transformers(demo_model):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(demo_model)
    template = chat.load(demo_model, checkpoint.load(demo_model).tokenizer_config)
    assert template is not None
    for messages in CONVERSATIONS:
        if any(m.role == "tool" for m in messages):
            with pytest.raises(TemplateFailure, match="unknown role: tool"):
                template.render(messages)
            continue
        plain = [{"role": m.role, "content": m.content} for m in messages]
        expected = theirs.apply_chat_template(plain, tokenize=False, add_generation_prompt=True)
        assert template.render(messages) == expected


def test_a_template_may_refuse_in_its_own_words():
    template = ChatTemplate("{{ raise_exception('roles must alternate') }}", {})
    with pytest.raises(TemplateFailure, match=r"^roles must alternate$"):
        template.render([Message("user", "x")])


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ dict.__init__.__globals__ }}",
        "{{ namespace(__class__=1) }}",
        "{% set ns = namespace() %}{% set ns.__dict__ = {} %}",
        "{% for i in range(99999999) %}{% endfor %}",
        "{{ messages[0].nothing.more }}",
        "{{ 1 / 0 }}",
        "{{ messages + 1 }}",
    ],
)
def test_a_template_may_not_reach_out_or_break(source):
    with pytest.raises(TemplateFailure) as caught:
        ChatTemplate(source, {}).render([Message("user", "secret")])
    assert "secret" not in str(caught.value)


def test_broken_templates_are_named(tmp_path):
    path = write_checkpoint(tmp_path, chat_template="{% for %}")
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja"):
        chat.load(path, {})
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: chat_template"):
        chat.load(write_checkpoint(tmp_path / "b", chat_template=None), {"chat_template": [1]})


def test_no_template(tmp_path):
    path = write_checkpoint(tmp_path, chat_template=None)
    assert chat.load(path, {}) is None
    assert chat.load(path, {"chat_template": [{"name": "rag", "template": "x"}]}) is None
