"""What must hold of every rendered overlay, one sentence each. A rule yields what is wrong; nothing: it holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from tests.deploy.render import Pod, Render

Rule = Callable[[Render], Iterator[str]]
RULES: list[Rule] = []
CLOSE_SECONDS, ENGINE_STOP_SECONDS, MARGIN_SECONDS = 3, 5, 5


def rule(check: Rule) -> Rule:
    RULES.append(check)
    return check


def pod_rule(check: Callable[[Pod], bool]) -> Callable[[Pod], bool]:
    """A rule about every pod, also those of custom resources."""

    def over_all(render: Render) -> Iterator[str]:
        yield from (pod.name for pod in render.pods() if not check(pod))

    over_all.__name__ = check.__name__
    RULES.append(over_all)
    return check


def capo_rule(check: Callable[[Pod], bool]) -> Callable[[Pod], bool]:
    """A rule about every pod that runs Capo."""

    def over_all(render: Render) -> Iterator[str]:
        yield from (pod.name for pod in render.capo_pods() if not check(pod))

    over_all.__name__ = check.__name__
    RULES.append(over_all)
    return check


def serving(render: Render) -> Iterator[Pod]:
    yield from (pod for pod in render.pods() if pod.kind == "Deployment" and pod.component in ("serve", "control"))
