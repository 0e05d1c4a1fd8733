"""What `kv_connector_extra_config` may hold. Pure: it never imports vLLM."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from kvferry.errors import ConfigError
from kvferry.handoff.digests import DigestKind

SECRET_VARIABLE = "KVFERRY_CLUSTER_SECRET"


class ConnectorSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The connector's settings, one for each key of `kv_connector_extra_config`.

    `listen` is where rank 0 listens for peers; with a fixed port, rank r takes that port + r. `advertise_host` is what
    peers connect to where it is not the bound address. `router` is the URL of
    the router to join and `url` this vLLM server's own; without a router nothing is registered. `max_loading_share` is
    the part of all blocks that may wait for handoffs at a time, so that early requests leave room. `layers_a_publish`
    splits a chunk's publication into groups of layers: 0 is the whole chunk at once, `auto` chooses by what was seen.
    `on_loaded` names a function `package.module:function` that is called with the KV tensors and the block ids of each
    delivered handoff before vLLM may use them: for tests. `trace` names a file that gets a line for each moment of
    each handoff.
    `pool` is the address of this host's pool node, `pool_directory` tells what others hold; a request waits
    `pool_wait_s` for the pool's answer; each load and each save is over within `pool_deadline_s`. Blocks in GPU memory
    come and go through `pool_staging_bytes` of pinned memory, for each rank.
    """

    listen: str = "tcp://127.0.0.1:0"
    advertise_host: str | None = None
    transports: tuple[str, ...] = ("cuda", "shm", "tcp")
    router: str | None = None
    url: str | None = None
    instance_id: str | None = None
    model: str | None = None
    namespace: str = "default"
    secret_file: str | None = None
    lease_ttl_s: float = 5.0
    heartbeat_s: float = 1.0
    digest: DigestKind = "xxh3"
    max_loading_share: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.8
    layers_a_publish: Annotated[int, msgspec.Meta(ge=0)] | Literal["auto"] = "auto"
    on_loaded: str | None = None
    trace: str | None = None
    pool: str | None = None
    pool_directory: str | None = None
    pool_wait_s: Annotated[float, msgspec.Meta(gt=0)] = 0.1
    pool_deadline_s: Annotated[float, msgspec.Meta(gt=0)] = 5.0
    pool_staging_bytes: Annotated[int, msgspec.Meta(gt=0)] = 64 << 20

    def listen_at(self, rank: int) -> str:
        """Where this rank listens.

        Raises: ConfigError: `listen` is no `tcp://host:port`.
        """
        host, _, port = self.listen.rpartition(":")
        if not host.startswith("tcp://") or not port.isdigit():
            raise ConfigError(f"kv_connector_extra_config.listen is {self.listen!r}; expected tcp://host:port")
        return f"{host}:{int(port) + rank}" if int(port) else self.listen

    def secret(self) -> bytes | None:
        """The cluster's secret from `secret_file`, or from the environment; None where neither is set.

        It is no setting of its own, because vLLM writes `kv_connector_extra_config` into its log.

        Raises: ConfigError: the file cannot be read or is empty.
        """
        if self.secret_file is None:
            value = os.environ.get(SECRET_VARIABLE)
            return value.encode() if value else None
        try:
            secret = Path(self.secret_file).read_bytes().strip()
        except OSError as error:
            raise ConfigError(f"kv_connector_extra_config.secret_file cannot be read: {error}") from error
        if not secret:
            raise ConfigError(
                f"kv_connector_extra_config.secret_file {self.secret_file} is empty; put a secret into it"
            )
        return secret


def settings_from_extra_config(extra: Mapping[str, Any]) -> ConnectorSettings:
    """Check and convert `kv_connector_extra_config`.

    Raises: ConfigError: a key is unknown (the message names the nearest right one) or a value is bad.
    """
    known = ConnectorSettings.__struct_fields__
    for key in extra:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
            raise ConfigError(f"kv_connector_extra_config has an unknown key {key!r}; {hint}")
    try:
        settings = msgspec.convert(dict(extra), ConnectorSettings)
    except msgspec.ValidationError as error:
        raise ConfigError(f"kv_connector_extra_config: {error}") from error
    if settings.pool is None and settings.pool_directory is not None:
        raise ConfigError(
            "kv_connector_extra_config has a pool_directory but no pool: set pool to this host's node (tcp://host:port)"
        )
    if settings.router is not None and settings.url is None:
        raise ConfigError(
            "kv_connector_extra_config has a router but no url: set url to the base of this server's HTTP address "
            "(http://host:port), so that the router can send requests to it"
        )
    return settings
