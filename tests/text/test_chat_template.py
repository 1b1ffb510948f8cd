"""Foreign templates: they can neither reach out nor run without end, and they fail with a typed error."""

from __future__ import annotations

from typing import Any

import pytest

from npllama.errors import ChatTemplateError, NpllamaError, ResourceLimitError
from npllama.text.chat_template import MAX_TEMPLATE, render
from npllama.text.shield import Shield


def run(source: str, **variables: Any) -> str:
    return render(source, variables, Shield([], []))


BLOCKS = (
    "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set y %}{{ n.x }}{{ n.x }}{% endset %}{% set n.x = y %}"
    "{% endfor %}"
)
NESTED = (
    "{% set r = range(1000) | list %}{% for a in r %}{% for b in r %}{% for c in r %}"
    "{% endfor %}{% endfor %}{% endfor %}"
)


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% for a in range(99999) %}{{ 'x' * 1000 }}{% endfor %}",
        "{% for a in range(99999) %}" + "x" * 1000 + "{% endfor %}",
        "{{ 'x' * 100000000000000 }}",
        "{{ 100000000000000 * 'x' }}",
        "{{ ('x' * 1000000) * 1000000 }}",
        "{{ [0] * 100000000000000 }}",
        "{{ 2 ** 100000000000000 }}",
        "{{ 'x'.ljust(100000000000000) }}",
        "{{ 'x' | center(100000000000000) }}",
        "{{ '%100000000000000d' % 1 }}",
        "{{ '%100000000000000d' | format(1) }}",
        "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
        "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
        "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = [n.x, n.x] | join %}{% endfor %}",
        "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x.replace('a', 'aa') %}{% endfor %}",
        "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x | replace('a', 'aa') %}{% endfor %}",
        BLOCKS,
        "{% set n = namespace(x=9) %}{% for i in range(60) %}{% set n.x = n.x * n.x %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        NESTED,
        "x" * (MAX_TEMPLATE + 1),
    ],
)
def test_a_template_without_end_is_stopped(source: str) -> None:
    with pytest.raises(ResourceLimitError, match="chat template"):
        run(source)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.__class__() }}",
        "{{ raise_exception.__globals__.json }}",
        "{{ strftime_now.__globals__['json'] }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ ('a' | attr('__class__')).__name__ }}",
        "{{ '{0.__class__}'.format(1) }}",
        "{{ '{x}'.format_map({}) }}",
        "{{ messages.append(1) }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
        "{% extends 'a' %}",
        "{{ range(1000000000) }}",
        "{{ 1 / 0 }}",
        "{{ none + 1 }}",
        "{{ missing.attribute }}",
        "{{ messages[0].content | nofilter }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% for %}",
        "{{ '",
        "{% unknown %}",
    ],
)
def test_a_template_that_reaches_out_or_fails_is_a_typed_error(source: str) -> None:
    with pytest.raises(NpllamaError) as caught:
        run(source, messages=[{"role": "user", "content": "x"}])
    assert isinstance(caught.value, (ChatTemplateError, ResourceLimitError))
    assert "chat template" in str(caught.value)


def test_a_syntax_error_is_shown_with_its_line() -> None:
    with pytest.raises(ChatTemplateError, match="line 2"):
        run("a\n{% for %}")


def test_a_template_may_refuse_a_dialog_with_its_own_words() -> None:
    with pytest.raises(ChatTemplateError, match="refuses the dialog: roles must alternate <x>"):
        render(
            "{{ raise_exception('roles must alternate ' + m) }}", {"m": (s := Shield(["<x>"], ["<x>"])).hide("<x>")}, s
        )


def test_shielded_text_in_a_failure_is_shown_as_it_was() -> None:
    shield = Shield(["<x>"], ["<x>"])
    with pytest.raises(ChatTemplateError, match="no attribute '<x>'"):
        render("{{ {}[m].y }}", {"m": shield.hide("<x>")}, shield)


LOOP_CONTROLS = (
    "{% for i in range(9) %}{% if i == 2 %}{% continue %}{% endif %}{% if i == 4 %}{% break %}{% endif %}{{ i }}"
    "{% endfor %}"
)
LOOP = "{% for x in 'abc' %}{{ loop.index }}{{ x }}{{ loop.last }}{{ loop.length }} {% endfor %}"

RENDERED = [
    ("{% if true %}\n  a\n  {% endif %}\nb", "  a\nb"),
    ("{{ {'b': '<é>', 'a': [1, none]} | tojson }}", '{"b": "<é>", "a": [1, null]}'),
    ("{{ {'b': 1, 'a': 2} | tojson(indent=2, sort_keys=true) }}", '{\n  "a": 2,\n  "b": 1\n}'),
    ("{{ {'a': 'é'} | tojson(ensure_ascii=true) }}", '{"a": "\\u00e9"}'),
    (LOOP_CONTROLS, "013"),
    (LOOP, "1aFalse3 2bFalse3 3cTrue3 "),
    ("{% generation %}a{{ 1 + 1 }}{% endgeneration %}b", "a2b"),
    ("{% for k, v in {'a': 1}.items() %}{{ k ~ v ~ none }}{% else %}-{% endfor %}", "a1None"),
    ("{% for x in nothing %}x{% else %}-{% endfor %}", "-"),
    ("{{ strftime_now('%%') }}{{ '%s-%03d' % ('a', 7) }}{{ dict(a=1).a }}", "%a-0071"),
    ("{{ undefined_name }}{{ undefined_name is defined }}{{ tools is none }}", "FalseTrue"),
    ("{{ messages.__class__ }}{{ raise_exception.__globals__ }}", ""),
]


@pytest.mark.parametrize(("source", "expected"), RENDERED)
def test_templates_are_rendered(source: str, expected: str) -> None:
    assert run(source, tools=None, messages=[]) == expected


@pytest.mark.torch
@pytest.mark.parametrize(("source", "expected"), RENDERED)
def test_transformers_renders_templates_the_same(source: str, expected: str) -> None:
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    rendered, _ = utils.render_jinja_template([[{"role": "user", "content": "x"}]], chat_template=source)
    assert rendered == [expected]


def test_json_of_a_message_is_shown_as_it_was_and_spells_nothing() -> None:
    shield = Shield(["<s>"], ["<s>é"])
    text = render("{{ m | tojson }}{{ [m] | tojson(ensure_ascii=true) }}", {"m": shield.hide("<s>é")}, shield)
    assert "<s>" not in text
    assert shield.show(text) == '"<s>é"["<s>\\u00e9"]'


def test_a_long_dialog_fits_the_budget() -> None:
    message = {"role": "user", "content": "x" * 2000}
    template = "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] | trim + '</' + '>' }}{% endfor %}"
    assert len(run(template, messages=[message] * 500)) > 1_000_000
