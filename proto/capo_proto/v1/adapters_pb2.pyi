from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class AdapterState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ADAPTER_STATE_UNSPECIFIED: _ClassVar[AdapterState]
    ADAPTER_STATE_AVAILABLE: _ClassVar[AdapterState]
    ADAPTER_STATE_LOADING: _ClassVar[AdapterState]
    ADAPTER_STATE_LOADED: _ClassVar[AdapterState]
    ADAPTER_STATE_DRAINING: _ClassVar[AdapterState]
    ADAPTER_STATE_REFUSED: _ClassVar[AdapterState]

class PinState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PIN_STATE_UNSPECIFIED: _ClassVar[PinState]
    PIN_STATE_HELD: _ClassVar[PinState]
    PIN_STATE_LOADING: _ClassVar[PinState]
    PIN_STATE_REFUSED: _ClassVar[PinState]
    PIN_STATE_MISSING: _ClassVar[PinState]
    PIN_STATE_NO_ROOM: _ClassVar[PinState]
ADAPTER_STATE_UNSPECIFIED: AdapterState
ADAPTER_STATE_AVAILABLE: AdapterState
ADAPTER_STATE_LOADING: AdapterState
ADAPTER_STATE_LOADED: AdapterState
ADAPTER_STATE_DRAINING: AdapterState
ADAPTER_STATE_REFUSED: AdapterState
PIN_STATE_UNSPECIFIED: PinState
PIN_STATE_HELD: PinState
PIN_STATE_LOADING: PinState
PIN_STATE_REFUSED: PinState
PIN_STATE_MISSING: PinState
PIN_STATE_NO_ROOM: PinState

class Adapter(_message.Message):
    __slots__ = ("name", "revision", "state", "reason_code", "reason", "aliases", "rank", "created_at", "requests_in_flight", "pinned", "canary_of", "notes")
    NAME_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    REASON_CODE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    ALIASES_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    CREATED_AT_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_IN_FLIGHT_FIELD_NUMBER: _ClassVar[int]
    PINNED_FIELD_NUMBER: _ClassVar[int]
    CANARY_OF_FIELD_NUMBER: _ClassVar[int]
    NOTES_FIELD_NUMBER: _ClassVar[int]
    name: str
    revision: str
    state: AdapterState
    reason_code: str
    reason: str
    aliases: _containers.RepeatedScalarFieldContainer[str]
    rank: int
    created_at: int
    requests_in_flight: int
    pinned: bool
    canary_of: _containers.RepeatedScalarFieldContainer[str]
    notes: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, name: _Optional[str] = ..., revision: _Optional[str] = ..., state: _Optional[_Union[AdapterState, str]] = ..., reason_code: _Optional[str] = ..., reason: _Optional[str] = ..., aliases: _Optional[_Iterable[str]] = ..., rank: _Optional[int] = ..., created_at: _Optional[int] = ..., requests_in_flight: _Optional[int] = ..., pinned: _Optional[bool] = ..., canary_of: _Optional[_Iterable[str]] = ..., notes: _Optional[_Iterable[str]] = ...) -> None: ...

class ListAdaptersRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListAdaptersResponse(_message.Message):
    __slots__ = ("adapters",)
    ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    adapters: _containers.RepeatedCompositeFieldContainer[Adapter]
    def __init__(self, adapters: _Optional[_Iterable[_Union[Adapter, _Mapping]]] = ...) -> None: ...

class Pin(_message.Message):
    __slots__ = ("reference", "state", "reason_code", "reason", "revisions")
    REFERENCE_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    REASON_CODE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    REVISIONS_FIELD_NUMBER: _ClassVar[int]
    reference: str
    state: PinState
    reason_code: str
    reason: str
    revisions: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, reference: _Optional[str] = ..., state: _Optional[_Union[PinState, str]] = ..., reason_code: _Optional[str] = ..., reason: _Optional[str] = ..., revisions: _Optional[_Iterable[str]] = ...) -> None: ...

class PinAdapterRequest(_message.Message):
    __slots__ = ("reference",)
    REFERENCE_FIELD_NUMBER: _ClassVar[int]
    reference: str
    def __init__(self, reference: _Optional[str] = ...) -> None: ...

class UnpinAdapterRequest(_message.Message):
    __slots__ = ("reference",)
    REFERENCE_FIELD_NUMBER: _ClassVar[int]
    reference: str
    def __init__(self, reference: _Optional[str] = ...) -> None: ...

class UnpinAdapterResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListPinsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListPinsResponse(_message.Message):
    __slots__ = ("pins",)
    PINS_FIELD_NUMBER: _ClassVar[int]
    pins: _containers.RepeatedCompositeFieldContainer[Pin]
    def __init__(self, pins: _Optional[_Iterable[_Union[Pin, _Mapping]]] = ...) -> None: ...

class Canary(_message.Message):
    __slots__ = ("revision", "percent")
    REVISION_FIELD_NUMBER: _ClassVar[int]
    PERCENT_FIELD_NUMBER: _ClassVar[int]
    revision: str
    percent: int
    def __init__(self, revision: _Optional[str] = ..., percent: _Optional[int] = ...) -> None: ...

class ListAliasesRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListAliasesResponse(_message.Message):
    __slots__ = ("aliases",)
    ALIASES_FIELD_NUMBER: _ClassVar[int]
    aliases: _containers.RepeatedCompositeFieldContainer[Alias]
    def __init__(self, aliases: _Optional[_Iterable[_Union[Alias, _Mapping]]] = ...) -> None: ...

class GetAliasRequest(_message.Message):
    __slots__ = ("alias",)
    ALIAS_FIELD_NUMBER: _ClassVar[int]
    alias: str
    def __init__(self, alias: _Optional[str] = ...) -> None: ...

class SetAliasRequest(_message.Message):
    __slots__ = ("alias", "revision", "canary", "expected")
    ALIAS_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    CANARY_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_FIELD_NUMBER: _ClassVar[int]
    alias: str
    revision: str
    canary: Canary
    expected: str
    def __init__(self, alias: _Optional[str] = ..., revision: _Optional[str] = ..., canary: _Optional[_Union[Canary, _Mapping]] = ..., expected: _Optional[str] = ...) -> None: ...

class RollbackAliasRequest(_message.Message):
    __slots__ = ("alias",)
    ALIAS_FIELD_NUMBER: _ClassVar[int]
    alias: str
    def __init__(self, alias: _Optional[str] = ...) -> None: ...

class RemoveAliasRequest(_message.Message):
    __slots__ = ("alias",)
    ALIAS_FIELD_NUMBER: _ClassVar[int]
    alias: str
    def __init__(self, alias: _Optional[str] = ...) -> None: ...

class RemoveAliasResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Alias(_message.Message):
    __slots__ = ("alias", "revision", "write_once", "updated_at", "canary", "history", "warmed")
    ALIAS_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    WRITE_ONCE_FIELD_NUMBER: _ClassVar[int]
    UPDATED_AT_FIELD_NUMBER: _ClassVar[int]
    CANARY_FIELD_NUMBER: _ClassVar[int]
    HISTORY_FIELD_NUMBER: _ClassVar[int]
    WARMED_FIELD_NUMBER: _ClassVar[int]
    alias: str
    revision: str
    write_once: bool
    updated_at: int
    canary: Canary
    history: _containers.RepeatedCompositeFieldContainer[AliasHistoryEntry]
    warmed: bool
    def __init__(self, alias: _Optional[str] = ..., revision: _Optional[str] = ..., write_once: _Optional[bool] = ..., updated_at: _Optional[int] = ..., canary: _Optional[_Union[Canary, _Mapping]] = ..., history: _Optional[_Iterable[_Union[AliasHistoryEntry, _Mapping]]] = ..., warmed: _Optional[bool] = ...) -> None: ...

class AliasHistoryEntry(_message.Message):
    __slots__ = ("revision", "at")
    REVISION_FIELD_NUMBER: _ClassVar[int]
    AT_FIELD_NUMBER: _ClassVar[int]
    revision: str
    at: int
    def __init__(self, revision: _Optional[str] = ..., at: _Optional[int] = ...) -> None: ...
