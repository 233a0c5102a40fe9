"""Chat templates that try to get out of their sandbox: rendering them runs nothing and reads nothing."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from jinja2.exceptions import TemplateError

ESCAPES = [
    "{{{{ ''.__class__.__mro__[1].__subclasses__() }}}}",
    "{{{{ cycler.__init__.__globals__.os.system('touch {marker}') }}}}",
    "{{{{ lipsum.__globals__['os'].popen('touch {marker}').read() }}}}",
    "{{{{ joiner.__init__.__globals__.os.system('touch {marker}') }}}}",
    "{{{{ namespace.__init__.__globals__.os.system('touch {marker}') }}}}",
    "{{{{ self.__init__.__globals__.__builtins__.open('{marker}', 'w') }}}}",
    "{{{{ self._TemplateReference__context.environment }}}}{{{{ self.__init__.__globals__ }}}}",
    "{{{{ messages.__class__.__base__.__subclasses__() }}}}",
    "{{{{ messages.append.__self__.__class__.__mro__ }}}}{{% set _ = messages.append(1) %}}",
    "{{{{ messages.pop() }}}}",
    "{{{{ messages[0].update({{'role': 'system'}}) }}}}",
    "{{{{ '{{0.__class__.__init__.__globals__}}'.format(cycler) }}}}",
    "{{{{ '%s'|format(cycler.__init__.__globals__) }}}}",
    "{{{{ ('{{0.__class__.__mro__}}'|attr('format'))(messages) }}}}",
    "{{{{ messages|attr('__class__')|attr('__mro__')|list }}}}",
    "{{{{ [messages]|map(attribute='__class__')|map(attribute='__mro__')|list }}}}{{{{ messages.__class__.mro() }}}}",
    "{{{{ ''['__class__']['__mro__'] }}}}{{{{ cycler['__init__']['__globals__']['os'].system('touch {marker}') }}}}",
    "{{% include '/etc/hostname' %}}",
    "{{% import '/etc/passwd' as x %}}",
    "{{% from 'os' import system %}}{{{{ system('touch {marker}') }}}}",
    "{{{{ raise_exception.__globals__['__builtins__']['open']('{marker}', 'w') }}}}",
    "{{{{ strftime_now.__globals__['__builtins__']['open']('{marker}', 'w') }}}}",
    "{{{{ tojson.__globals__ }}}}{{{{ messages|tojson.__globals__ }}}}",
]


@pytest.mark.parametrize("number", range(len(ESCAPES)))
def test_an_escape_is_refused_or_inert(make_tokenizer: Callable[..., Any], tmp_path: Path, number: int) -> None:
    marker = tmp_path / "marker"
    tokenizer = make_tokenizer(ESCAPES[number].format(marker=marker))
    messages = [{"role": "user", "content": "hello"}]
    try:
        shown = tokenizer.apply_chat_template(messages, tokenize=False)
    except (TemplateError, TypeError, AttributeError, ValueError):
        shown = ""
    assert not marker.exists()
    assert messages == [{"role": "user", "content": "hello"}], "a template changes nothing that it is given"
    assert not any(found in shown for found in ("subclasses", "<class 'os.", "__builtins__", "root:", "subprocess"))


def test_the_corpus_has_twenty_templates_and_jinja_is_one_without_known_escapes() -> None:
    assert len(ESCAPES) >= 20
    assert tuple(int(part) for part in version("jinja2").split(".")[:3]) >= (3, 1, 6)
