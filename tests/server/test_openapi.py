"""Whatever fits the server's own description of its requests, and what just does not, gets an
answer that is no accident: none of 5xx but 503. Schemathesis makes the requests."""

from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest
import schemathesis
from hypothesis import HealthCheck
from schemathesis import Case, GenerationMode

from tests.server.canary import Canary
from tests.server.servers import LIMIT_S, Served

NUM_EXAMPLES = 100
ROUTES = {
    "/v1/completions": "POST",
    "/v1/chat/completions": "POST",
    "/tokenize": "POST",
    "/detokenize": "POST",
    "/reset_prefix_cache": "POST",
    "/health": "GET",
    "/version": "GET",
    "/load": "GET",
    "/metrics": "GET",
    "/v1/models": "GET",
    "/v1/models/{model}": "GET",
}

WITH_BODY = ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"]


@pytest.fixture(scope="module")
def server(tiny, tmp_path_factory) -> Iterator[Served]:
    flags = ["--load-format", "dummy", "--max-model-len", "256", "--num-kv-blocks", "64"]
    flags += ["--enable-dev-endpoints"]
    with Served(str(tiny), *flags, log=tmp_path_factory.mktemp("server") / "log") as served:
        yield served


@pytest.fixture(scope="module")
def described(server) -> schemathesis.BaseSchema:
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json")


def make_small(body: Any) -> None:
    """Let a request that will be accepted end soon."""
    if isinstance(body, dict):
        for name, most in {"max_tokens": 3, "max_completion_tokens": 3, "n": 2}.items():
            value = body.get(name)
            if value is None or (isinstance(value, int) and value > most):
                body[name] = most


def test_all_routes_are_described(described):
    routes = {(path, method.upper()) for path in described for method in described[path]}
    assert routes == set(ROUTES.items())


@pytest.mark.parametrize(
    ("path", "mode"),
    [(path, GenerationMode.POSITIVE) for path in ROUTES]
    + [(path, GenerationMode.NEGATIVE) for path in WITH_BODY],
)
def test_no_request_is_an_accident(server, described, path, mode):
    operation = described[path][ROUTES[path]]
    statuses = set()

    @hypothesis.seed(1)
    @hypothesis.settings(
        max_examples=NUM_EXAMPLES,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @hypothesis.given(operation.as_strategy(generation_mode=mode))
    def call(case: Case) -> None:
        if mode is GenerationMode.POSITIVE:
            make_small(case.body)
        response = case.call(base_url=server.url, timeout=LIMIT_S)
        statuses.add(response.status_code)
        assert response.status_code < 500 or response.status_code == 503, response.text

    call()
    if mode is GenerationMode.NEGATIVE:
        assert 400 in statuses or 415 in statuses
    elif ROUTES[path] == "GET" and "{" not in path:
        assert statuses == {200}


def test_the_server_is_well_after_all_that(server):
    Canary(server).check()
