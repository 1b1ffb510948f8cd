"""Jinja chat templates, rendered in a sandbox with limits.

A template comes with a model and is a program of a stranger. The sandbox keeps it away from everything but its input;
the budget keeps it from running or growing without end. Both are deterministic: no clock decides.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Mapping, Sized
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from npllama.errors import ChatTemplateError, ResourceLimitError
from npllama.text.shield import Shield

#: The longest real template has some 20,000 characters.
MAX_TEMPLATE = 256 << 10
#: Steps and characters that a template may spend: so many, and so many more for each character of its input.
BUDGET, BUDGET_PER_CHARACTER = 1_000_000, 64
#: A number above this is not a width or a count that a template needs.
MAX_SIZE = 1_000_000

_WIDE = re.compile(r"%[^a-zA-Z%]*\d{5}")


class _Budget:
    """What is left of the steps and characters that a template may spend."""

    def __init__(self, amount: float) -> None:
        self.left = amount

    def spend(self, amount: float) -> None:
        self.left -= amount
        if self.left < 0:
            raise ResourceLimitError(
                "the chat template runs or writes without end", remedy="Use another template, or no template."
            )

    def result(self, value: Any) -> Any:
        """Charge for a value that the template made."""
        self.spend(1 + _size(value))
        return value

    def arguments(self, values: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        """Charge for what is passed to a function, and refuse absurd widths and counts."""
        for value in (*values, *named.values()):
            if isinstance(value, int) and abs(value) > MAX_SIZE:
                self.spend(self.left + 1)
            self.spend(_size(value))


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, with every call, filter, operator and loop on the budget."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, budget: _Budget) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, loopcontrols],
            finalize=budget.result,
            cache_size=0,
        )
        self.budget = budget
        self.globals = {name: self.globals[name] for name in ("range", "dict", "namespace")}
        self.filters = {name: _charged(name, function, budget) for name, function in self.filters.items()}

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        template = super()._parse(source, name, filename)
        _Metered().visit(template)
        return template

    def is_safe_callable(self, obj: Any) -> bool:
        # A format string can ask for any width; "%" and "~" serve templates as well.
        return getattr(obj, "__name__", "") not in ("format", "format_map") and super().is_safe_callable(obj)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        __self.budget.arguments(args, kwargs)
        return __self.budget.result(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "%" and isinstance(left, str):
            _refuse_wide(left)
        elif operator == "*":
            self.budget.spend(max(_length(left) * _count(right), _length(right) * _count(left)))
        elif operator == "**" and not (_count(left) <= MAX_SIZE and _count(right) <= 64):
            self.budget.spend(self.budget.left + 1)
        return self.budget.result(super().call_binop(context, operator, left, right))


class _Metered(NodeTransformer):
    """Puts loops and ``~`` on the budget: every item that is looped over passes a filter, ``~`` becomes one."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = nodes.Filter(node.iter, "list", [], [], None, None, lineno=node.lineno)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        items = nodes.List(node.nodes, lineno=node.lineno)
        return nodes.Filter(items, "join", [], [], None, None, lineno=node.lineno)


class _Generation(Extension):
    """The ``generation`` block, which marks a model's own text in templates made for training: its content counts."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 says a set

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def render(source: str, variables: Mapping[str, Any], shield: Shield) -> str:
    """Render a chat template.

    Parameters
    ----------
    source : str
        The template.
    variables : mapping
        What it may use; texts from outside must be shielded.
    shield : Shield
        The shield of those texts.

    Returns
    -------
    str
        The rendered text, shielded parts still shielded.

    Raises
    ------
    ResourceLimitError
        The template is too long, or runs or writes more than any real one.
    ChatTemplateError
        It is no template, asks for what the sandbox forbids, fails, or refuses the dialog itself.

    Notes
    -----
    As transformers does: ``trim_blocks`` and ``lstrip_blocks``, loop controls, ``raise_exception``, ``strftime_now``
    and a ``tojson`` that does not escape HTML.
    """
    if len(source) > MAX_TEMPLATE:
        raise ResourceLimitError(f"the chat template has {len(source)} characters, at most {MAX_TEMPLATE} are allowed")
    budget = _Budget(BUDGET + BUDGET_PER_CHARACTER * _deep_length(variables))
    environment = _Sandbox(budget)
    environment.filters["tojson"] = _charged("tojson", functools.partial(_to_json, shield), budget)
    environment.globals |= {"raise_exception": _refuse, "strftime_now": _strftime_now}
    parts: list[str] = []
    try:
        for part in environment.from_string(source).generate(**variables):
            budget.spend(len(part))
            parts.append(str.__str__(part))
    except ChatTemplateError as problem:
        raise ChatTemplateError(shield.show(problem.message), remedy=problem.remedy) from None
    except ResourceLimitError:
        raise
    except jinja2.TemplateSyntaxError as problem:
        raise ChatTemplateError(
            f"the chat template is not valid Jinja: line {problem.lineno}: {problem.message}"
        ) from None
    except Exception as problem:  # whatever a stranger's program runs into
        raise ChatTemplateError(
            f"the chat template failed: {type(problem).__name__}: {shield.show(str(problem))}",
            remedy="Check the dialog's form, or use another template.",
        ) from None
    return "".join(parts)


def _charged(name: str, function: Callable[..., Any], budget: _Budget) -> Callable[..., Any]:
    """Put a filter on the budget."""

    @functools.wraps(function)
    def charged(*values: Any, **named: Any) -> Any:
        if name == "format":
            _refuse_wide(str(next(value for value in values if isinstance(value, str))))
        budget.arguments(values, named)
        return budget.result(function(*values, **named))

    return charged


def _to_json(
    shield: Shield,
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    text = json.dumps(
        shield.plain(value), ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
    return shield.hide(text)


def _refuse(message: Any) -> Any:
    raise ChatTemplateError(f"the chat template refuses the dialog: {message}", remedy="Change the dialog.")


def _strftime_now(form: str) -> str:
    _refuse_wide(form)
    return datetime.now().strftime(form)


def _refuse_wide(form: str) -> None:
    if _WIDE.search(form):
        raise ResourceLimitError("the chat template asks for text of an absurd width")


def _size(value: Any) -> int:
    """Characters or items of a value; for a whole number what a multiplication costs."""
    return value.bit_length() ** 2 // 4096 if isinstance(value, int) else _length(value)


def _length(value: Any) -> int:
    return len(value) if isinstance(value, Sized) and not isinstance(value, (jinja2.Undefined, range)) else 0


def _count(value: Any) -> float:
    return abs(value) if isinstance(value, (int, float)) else 0


def _deep_length(value: Any) -> int:
    """Characters in all texts of a value."""
    if isinstance(value, Mapping):
        return sum(map(_deep_length, value.values()))
    if isinstance(value, list):
        return sum(map(_deep_length, value))
    return len(value) if isinstance(value, str) else 0
