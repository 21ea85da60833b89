"""The terms of a request, from the keys of a prompt that is a dictionary."""

from collections.abc import Mapping
from typing import Any

from nanovllm.core.sequence import Terms
from nanovllm.errors import InvalidRequestError

MOST_MS = 1e9  # eleven days


def terms_of(fields: Mapping[str, Any]) -> Terms | None:
    """Terms from "tenant", "ttft_target_ms" and "tpot_target_ms"; None if none of them is given.

    Raises:
        InvalidRequestError: the tenant is no string, or a target no time.
    """
    given = fields.get("tenant")
    tenant = "" if given is None else given
    if not isinstance(tenant, str):
        raise InvalidRequestError("tenant", tenant, "must be a string")
    targets_s: list[float | None] = []
    for name in ("ttft_target_ms", "tpot_target_ms"):
        target_ms = fields.get(name)
        number = isinstance(target_ms, int | float) and not isinstance(target_ms, bool)
        if target_ms is not None and not (number and 0 < target_ms <= MOST_MS):
            why = f"must be milliseconds, above 0 and up to {MOST_MS:.0f}"
            raise InvalidRequestError(name, target_ms, why)
        targets_s.append(None if target_ms is None else target_ms / 1000)
    return Terms(tenant, *targets_s) if tenant or any(targets_s) else None
