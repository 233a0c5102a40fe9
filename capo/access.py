"""Who may come in: keys, scopes and limits, by the one table of rules, for HTTP and gRPC alike.

A service without any key is open to whoever reaches it, which without an explicit override is this machine alone
(:func:`require_guard`). As soon as a key was made, every request needs one, except what the table calls public.
"""

from __future__ import annotations

import ipaddress
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from urllib.parse import urlsplit

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge

from capo.access_rules import RULES, Rule
from capo.audit import Act, AuditWriter
from capo.keys.quota import Quotas
from capo.keys.records import KeyRecord
from capo.keys.ring import KeyRing
from capo.requests_in_flight import RequestsInFlight
from registry import errors
from registry.principal import Admission, Principal, admitted
from serve.access import Ask

_NO_KEY = (
    "This service needs an API key: send it as 'Authorization: Bearer <key>'. `capo keys create` makes one for whoever "
    "runs the service."
)


class AccessMetrics:
    """As many series as there are keys; who makes keys bounds them."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self.refusals = Counter(
            "capo_access_refusals_total", "Requests refused at the door.", ("protocol", "reason"), registry=registry
        )
        self.errors = Counter(
            "capo_request_errors_total",
            "Requests answered with an error, by error.code; each limit has one.",
            ("protocol", "code"),
            registry=registry,
        )
        self.requests = Counter(
            "capo_key_requests_total", "Requests let in, by key.", ("key", "protocol"), registry=registry
        )
        self.tokens = Counter(
            "capo_key_tokens_total", "Prompt and completion tokens used, by key.", ("key",), registry=registry
        )
        self.keys_age = Gauge(
            "capo_keys_age_seconds", "Since the keys were last read from the database.", registry=registry
        )


class Door:
    """Decides about every request of a process. ``house`` is the service's own tenant.

    ``audit`` gets the admin acts; ``None``: there is no place for a log.
    """

    def __init__(
        self,
        ring: KeyRing,
        *,
        house: str,
        metrics: AccessMetrics,
        audit: AuditWriter | None,
        rules: Mapping[str, Rule] = RULES,
    ) -> None:
        self._ring = ring
        self._house = house
        self._metrics = metrics
        self._audit = audit
        self._rules = rules
        self._quotas = Quotas()
        self._in_flight = RequestsInFlight()
        metrics.keys_age.set_function(lambda: time.monotonic() - ring.read_at)

    @property
    def is_open(self) -> bool:
        """Whether nobody needs a key."""
        return self._ring.is_empty

    def count_refusal(self, protocol: str, code: str) -> None:
        """Count a refusal made before there was a request to decide about, such as an oversized head."""
        self._metrics.errors.labels(protocol, code).inc()

    async def drain(self, deadline_seconds: float) -> int:
        """See :meth:`capo.requests_in_flight.RequestsInFlight.drain`. Inference drains itself."""
        return await self._in_flight.drain(deadline_seconds)

    @contextmanager
    def let_in(self, ask: Ask) -> Iterator[Admission]:
        """See :meth:`serve.access.Access.let_in`."""
        rule = self._rules.get(ask.operation)
        key: KeyRecord | None = None
        admission: Admission | None = None
        result = "ok"
        try:
            try:
                if rule is None:
                    raise errors.PermissionDeniedError(f"{ask.operation} is not offered.", code="not_in_the_rules")
                key = self._key(ask, rule)
                self._in_flight.require_open(rule)
            except errors.CapoError as error:
                self._metrics.refusals.labels(ask.protocol, error.code).inc()
                raise
            admission = Admission(self._principal(key, rule))
            with self._in_flight.one(rule), self._counted(ask, key, admission), admitted(admission):
                yield admission
        except errors.CapoError as error:
            result = ask.error_code = error.code
            raise
        except Exception:
            result = ask.error_code = ask.error_code or "internal_error"
            raise
        except BaseException:
            result = "cancelled"
            raise
        finally:
            if ask.error_code is not None:
                self._metrics.errors.labels(ask.protocol, ask.error_code).inc()
            if self._audit is not None and rule is not None and rule.is_admin_act:
                self._audit.write(
                    Act(
                        key_id=None if key is None else key.id,
                        tenant=None if admission is None else admission.principal.tenant,
                        operation=ask.operation,
                        target=ask.target[:500],
                        peer=ask.peer,
                        result=ask.result or result,
                        request_id=ask.request_id,
                        notes={} if admission is None else admission.notes,
                    )
                )

    def _key(self, ask: Ask, rule: Rule) -> KeyRecord | None:
        """The key that lets this request in; ``None``: it needs none."""
        if rule.is_public or self._ring.is_empty:
            return None
        scheme, _, text = (ask.credential or "").partition(" ")
        if scheme.lower() != "bearer" or not text:
            raise errors.AuthenticationError(_NO_KEY)
        key = self._ring.find(text.strip())
        if not key.scopes & rule.scopes:
            needed = " or ".join(sorted(rule.scopes))
            raise errors.PermissionDeniedError(
                f"This key is good for {', '.join(sorted(key.scopes))}, and this needs {needed}.", code="missing_scope"
            )
        return key

    def _principal(self, key: KeyRecord | None, rule: Rule) -> Principal:
        if key is None and rule.is_public:
            return Principal(self._house, None, frozenset())
        if key is None:
            return Principal.local(self._house)
        return Principal(key.tenant, key.id, key.scopes, key.models, owns_shared=key.tenant == self._house)

    @contextmanager
    def _counted(self, ask: Ask, key: KeyRecord | None, admission: Admission) -> Iterator[None]:
        if key is None:
            yield
            return
        quota = self._quotas.of(key)
        bound = quota.enter()
        ask.answer_headers |= quota.headers()
        if bound is not None:
            self._metrics.refusals.labels(ask.protocol, bound.value).inc()
            raise quota.refusal(bound)
        self._metrics.requests.labels(key.id, ask.protocol).inc()
        try:
            yield
        finally:
            quota.leave(admission.tokens)
            self._metrics.tokens.labels(key.id).inc(admission.tokens)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches ``host``."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def require_guard(host: str, ring: KeyRing, *, allow_unauthenticated: bool) -> None:
    """Raises:
    InvalidRequestError: anybody who reaches ``host`` could use the service.
    """
    if ring.is_empty and not is_loopback(host) and not allow_unauthenticated:
        raise errors.InvalidRequestError(
            f"host={host} lets other machines in, and there is no key to tell them apart. Make one with `capo keys "
            "create --scope infer`, or say --allow-unauthenticated where something in front of Capo decides.",
            code="no_keys",
            param="host",
        )


def refuse_foreign_pages(host: str, origin: str | None) -> None:
    """For an open service on loopback: no web page of another site may use it through its visitor's browser.

    A page can make any name mean 127.0.0.1 (DNS rebinding); then ``Host`` gives it away. And it can send simple
    requests to 127.0.0.1 itself; then ``Origin`` does.

    Raises:
        PermissionDeniedError: it comes from such a page.
    """
    for url in (f"//{host}", origin):
        if url is None or is_loopback(_hostname(url)):
            continue
        raise errors.PermissionDeniedError(
            "Without keys this service answers only requests that are meant for this machine: send them to localhost "
            "or 127.0.0.1, and not from a web page. Behind a proxy of this machine, start it with "
            "--allow-unauthenticated.",
            code="foreign_origin",
        )


def _hostname(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""
