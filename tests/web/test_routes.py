"""The routes without an engine: the page's headers, the JSON that draws a pattern, and what is refused."""

import json
import time
from pathlib import Path

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from vllm_power.lifetimes import lifetimes
from vllm_power.pattern import NAMES, POWER, preset
from vllm_power.tools.web import routes
from vllm_power.tools.web.estimate import estimate
from vllm_power.tools.web.question import Question


@pytest.fixture
def client() -> TestClient:
    app = FastAPI()
    routes.attach(app)
    return TestClient(app)


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder instead of the page's."""
    (tmp_path / "index.html").write_text("<title>power</title>")
    (tmp_path / "power.js").write_text("'use strict'")
    (tmp_path / "notes.py").write_text("secret")
    monkeypatch.setattr(routes, "PAGE", tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "path, media_type", [("/power", "text/html"), ("/power/power.js", "text/javascript")]
)
def test_the_page_may_load_only_what_is_its_own(client, page, path, media_type):
    answer = client.get(path)
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith(media_type)
    assert answer.headers["content-security-policy"].startswith("default-src 'self';")
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["cache-control"] == "no-cache"


@pytest.mark.parametrize("name", ["notes.py", "none.js", "..%2froutes.py", "%2e%2e/routes.py", ""])
def test_no_other_file_is_served(client, page, name):
    assert client.get(f"/power/{name}", follow_redirects=False).status_code in (307, 404)


def test_everything_is_read_only(client, page):
    for path in ("/power", "/v1/power/info", "/v1/power/live", "/v1/power/pattern"):
        assert client.post(path).status_code == 405


def test_without_an_engine(client):
    answer = client.get("/v1/power/info").json()
    assert answer["engine"] is False
    assert set(answer["versions"]) == {"vllm-power", "vllm", "torch", "triton"}
    live = client.get("/v1/power/live")
    assert live.status_code == 404
    assert "no engine" in live.json()["detail"]


@pytest.mark.parametrize("name", NAMES)
def test_a_drawing_is_the_patterns(client, name):
    pattern, last = preset(name), 63
    drawing = client.get("/v1/power/pattern", params={"tokens": 16_384, "layers": 3, "pattern": name}).json()
    assert drawing["pattern"]["text"] == str(pattern)
    assert (drawing["blocks"], drawing["query"]) == (64, last)
    assert drawing["visible"] == [k for k in range(64) if pattern.sees(last, k)]
    assert drawing["rows"] == [[k for k in range(64) if pattern.sees(q, k)] for q in range(64)]
    assert drawing["visible_counts"] == [len(row) for row in drawing["rows"]]
    assert drawing["hops"] == pattern.hops(last)
    assert drawing["reached"] == sum(hop is not None and hop <= 3 for hop in pattern.hops(last))
    assert drawing["density"] == pytest.approx(pattern.density(16_384))
    assert drawing["live"] == list(lifetimes(pattern, last).live)


@pytest.mark.parametrize("tail, first", [(0, None), (1, 63), (256, 63), (257, 62), (20_000, 0)])
def test_a_drawing_has_the_dense_tail(client, tail, first):
    drawing = client.get("/v1/power/pattern", params={"tokens": 16_384, "dense_tail": tail}).json()
    assert drawing["dense_from"] == first
    assert drawing["visible"] == list(POWER.visible_blocks(63))
    dense = 64 if first is None else first
    read = [len(POWER.visible_blocks(q)) if q < dense else q + 1 for q in range(64)]
    assert drawing["visible_counts"] == read
    assert drawing["density"] == pytest.approx(sum(read) / (64 * 65 / 2))
    assert drawing["live"] == (list(lifetimes(POWER, 63).live) if first is None else list(range(1, 65)))


@pytest.mark.parametrize("asked", [{"model": "Mixtral-8x7B"}, {"model": "Qwen2-7B", "mode": "training_free"}])
def test_what_is_left_out_is_the_presets_or_the_modes(client, asked):
    answer = client.get("/v1/power/estimate", params=asked).json()
    assert answer == json.loads(json.dumps(estimate(Question(**asked))))


@pytest.mark.parametrize("name", NAMES)
def test_a_million_tokens_take_less_than_a_second(client, name):
    start = time.process_time()
    drawing = client.get("/v1/power/pattern", params={"tokens": 1_048_576, "pattern": name}).json()
    assert time.process_time() - start < 1
    assert drawing["blocks"] == 4096
    assert drawing["rows"] is None
    if name == "power":
        assert (len(drawing["visible"]), drawing["layers_to_cover"]) == (15, 11)


@pytest.mark.parametrize(
    "asked, said",
    [
        ({"tokens": 0}, "greater than or equal to 1"),
        ({"tokens": 2**40}, "less than or equal to"),
        ({"tokens": "many"}, "valid integer"),
        ({"pattern": "powr"}, "'power'"),
        ({"block_size": 100}, "power of two"),
        ({"window_blocks": 0}, "at least 1"),
        ({"query": 64}, "outside the 64 blocks"),
        ({"tokens": 2**24, "pattern": "stride_slash", "stride": 1}, "fewer tokens"),
        ({"tokens": 2**24, "pattern": "full", "block_size": 16}, "fewer tokens"),
        ({"tokns": 5}, "not permitted"),
    ],
)
def test_nonsense_is_refused_with_its_cause(client, asked, said):
    answer = client.get("/v1/power/pattern", params=asked)
    assert answer.status_code == 422
    assert said in answer.text
