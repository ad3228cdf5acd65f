"""The server's audit: planted variances are found and named, and what is not an answer is never taken for one."""

import json
import socket
from functools import partial

import pytest
from mutation import check_control, check_mutant
from servers import CONTROLS, MUTANTS, CacheMerges, Engine, HalvesFromFive, TileByNeighbour, audit, completion, serving

from batchproof.audit.report import Report
from batchproof.audit.server import audit_server
from batchproof.audit.server.client import Client, _read, difference
from batchproof.audit.server.dialect import CHAT, COMPLETIONS
from batchproof.errors import ArgumentError


def check(report, relation):
    return next(check for check in report.checks if check.relation == relation)


def run(server, **options):
    return audit_server(server.url, "tiny", **{"max_concurrency": 4, "max_tokens": 4} | options)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_is_killed_and_named(mutant):
    report = check_mutant(mutant)
    assert Report.from_json(report.to_json()) == report
    assert report.reproduction is not None
    assert report.exit_code == 1


@pytest.mark.parametrize("control", CONTROLS, ids=lambda control: control.name)
def test_a_control_holds(control):
    report = check_control(control)
    assert report.exit_code == 0
    assert report.reproduction is None
    exercised = {c.relation for c in report.checks if c.verdict == "holds"}
    assert exercised >= {"repeat", "concurrency", "long neighbours", "short neighbours", "staggered arrivals"}


def test_classes_over_the_concurrency():
    (series,) = audit(HalvesFromFive).series
    classes = dict(zip(series.x, series.y, strict=True))
    assert {n: classes[n] for n in (1, 2, 4, 5, 8)} == {1: 0, 2: 0, 4: 0, 5: 1, 8: 1}


class NowAndThen(Engine):
    """Every second of its batches of 3 and more varies."""

    batches = 0

    def step(self):
        self.batches += len(self.batch) >= 3 and not self.batch[0].tokens
        super().step()

    def logits(self, sequence, hidden):
        varies = len(self.batch) >= 3 and self.batches % 2
        return self.in_halves(hidden) if varies else super().logits(sequence, hidden)


class OnceTorn(HalvesFromFive):
    """Its first batch of five has the bits of a smaller one, as one that was formed in two parts."""

    torn = None

    def logits(self, sequence, hidden):
        if len(self.batch) == 5:
            self.torn = self.torn or self.count
        return Engine.logits(self, sequence, hidden) if self.count == self.torn else super().logits(sequence, hidden)


class HalvesFrom33(Engine):
    def logits(self, sequence, hidden):
        return self.in_halves(hidden) if len(self.batch) >= 33 else super().logits(sequence, hidden)


def test_just_above_a_power_of_two_is_tried_first():
    report = audit(HalvesFrom33, max_concurrency=48, max_tokens=1)
    assert report.cause.threshold == 33
    assert report.series[0].x == (1, 2, 4, 8, 16, 32, 33, 48)


def test_a_torn_batch_does_not_move_the_threshold():
    assert audit(OnceTorn).cause.threshold == 5


def test_a_threshold_that_is_not_the_same_each_time_is_not_named():
    report = audit(NowAndThen)
    assert report.cause.relation == "concurrency"
    assert report.cause.threshold is None
    assert "not the same each time" in report.cause.detail


@pytest.mark.parametrize(
    "engine",
    [HalvesFromFive, partial(CacheMerges, cache=True), TileByNeighbour],
    ids=["concurrency", "cache", "long neighbours"],
)
def test_the_reproduction_shows_the_difference_and_nothing_where_there_is_none(engine, capsys):
    with serving(engine(quiet_s=0.03)) as varies, serving(Engine(cache=True, quiet_s=0.03)) as holds:
        program = run(varies, max_concurrency=5).reproduction
        exec(program, {})
        assert capsys.readouterr().out.startswith("differs:\n")
        exec(program.replace(str(varies.server_port), str(holds.server_port)), {})
        assert capsys.readouterr().out.startswith("the same\n")


@pytest.mark.parametrize("url", ["http://192.0.2.1:8000/v1", "http://0.0.0.0:8000", "https://[2001:db8::1]/v1"])
def test_another_machine_is_refused(url):
    with pytest.raises(ArgumentError, match="want this machine"):
        audit_server(url, "m")
    assert Client(url, "m", None, True, COMPLETIONS).url.startswith(url.removesuffix("/v1"))


def test_a_name_is_loopback_only_if_all_its_addresses_are(monkeypatch):
    addresses = [(2, 1, 6, "", ("127.0.0.1", 80)), (2, 1, 6, "", ("192.0.2.7", 80))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: addresses)
    with pytest.raises(ArgumentError, match=r"192\.0\.2\.7"):
        audit_server("http://both.example:8000", "m")
    addresses.pop()
    assert (
        Client("http://one.example:8000", "m", None, False, COMPLETIONS).url == "http://one.example:8000/v1/completions"
    )


@pytest.mark.parametrize(
    "url", ["127.0.0.1:8000", "ftp://127.0.0.1", "http://", "http://127.0.0.1:x", "http://127.0.0.1/v1?a=b"]
)
def test_a_malformed_url_is_refused(url):
    with pytest.raises(ArgumentError, match="base_url is"):
        audit_server(url, "m")


def test_a_password_in_the_url_is_refused_and_not_repeated():
    with pytest.raises(ArgumentError, match="want api_key") as caught:
        audit_server("http://user:hunter2@127.0.0.1:8000", "m")
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_concurrency": 1}, "max_concurrency is 1"),
        ({"max_requests": 0}, "max_requests is 0"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"limit_s": float("nan")}, "limit_s is nan"),
        ({"require": ["parallelism"]}, "require names parallelism"),
    ],
)
def test_arguments_are_checked(options, message):
    with pytest.raises(ArgumentError, match=message):
        audit_server("http://127.0.0.1:1", "m", **options)


def test_nobody_there_is_not_audited():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        report = audit_server(f"http://127.0.0.1:{free.getsockname()[1]}", "tiny")
    assert (report.verdict, report.exit_code) == ("not audited", 2)
    assert "refused" in report.error


def test_another_model_is_not_audited():
    with serving(Engine()) as server:
        report = audit_server(server.url, "huge")
    assert (report.exit_code, server.completions) == (2, 0)
    assert "'huge'" in report.error
    assert "tiny" in report.error


@pytest.mark.parametrize("ending", ["", "/", "/v1", "/v1/"])
def test_v1_may_be_left_out(ending):
    assert (
        Client(f"http://127.0.0.1:8000{ending}", "m", None, False, COMPLETIONS).url
        == "http://127.0.0.1:8000/v1/completions"
    )


def without(*path):
    """An answer that lacks something."""

    def describe(sequence):
        answer = completion(sequence)
        inner = answer
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = None
        return answer

    return describe


@pytest.mark.parametrize("path", [("choices", 0, "logprobs"), ("choices", 0, "logprobs", "tokens"), ("choices",)])
def test_an_answer_without_what_is_compared_is_none(path):
    with serving(Engine(), describe=without(*path)) as server:
        report = run(server)
    assert report.exit_code == 2
    assert {c.verdict for c in report.checks} == {"not exercised"}
    assert "not answered" in report.error


def test_answers_that_fail_at_times_never_pass_and_are_not_sent_again():
    key = "sk-very-secret"
    with serving(Engine(), fails=lambda number: number % 40 == 0) as server:
        report = run(server, api_key=key)
    assert (report.verdict, report.exit_code) == ("not audited", 2)
    assert check(report, "repeat").verdict == "holds"
    failed = [c for c in report.checks if "HTTP 500" in c.detail]
    assert failed
    assert {c.verdict for c in failed} == {"not exercised"}
    assert report.error.startswith(f"{server.completions // 40} of {server.completions} requests were not answered")
    assert server.keys == {f"Bearer {key}"}
    assert key not in report.to_json()  # though this server repeats it in its complaint
    assert "(the key)" in report.error


def test_a_difference_stands_although_other_requests_fail():
    with serving(HalvesFromFive(), fails=lambda number: number > 90) as server:
        report = run(server, max_concurrency=8)
    assert report.exit_code == 1
    assert report.error


def test_what_is_required_and_was_not_exercised_fails():
    report = audit(Engine, max_concurrency=2, require=["cache"])
    assert (report.verdict, report.exit_code) == ("not audited", 2)
    assert "cache: no prompt came from a cache" in report.gaps


@pytest.mark.parametrize("metrics", [True, False], ids=["by its metric", "by its time"])
def test_a_server_that_never_batches_is_not_audited(metrics):
    with serving(Engine(slots=1, step_s=0.003), metrics=metrics) as server:
        report = run(server)
    assert report.exit_code == 2
    assert "one after another" in check(report, "concurrency").detail
    assert check(report, "concurrency").cases == 0


def test_the_servers_own_count_is_reported():
    with serving(Engine(step_s=0.012), metrics=True) as server:
        report = run(server, max_concurrency=2)
    assert report.exit_code == 0
    assert "at most 2 running by the server's own count" in check(report, "concurrency").detail
    assert report.not_observed == ()


@pytest.mark.parametrize("bound", [1, 13, 40, 60])
def test_the_bound_on_requests_is_kept_and_told(bound):
    seen = []
    with serving(Engine()) as server:
        report = run(server, max_requests=bound, progress=lambda *event: seen.append(event))
    assert server.completions <= bound
    assert seen[-1][1:] == (server.completions, bound)
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)
    stopped = [c for c in report.checks if f"max_requests is {bound}" in c.detail]
    assert stopped
    assert all(c.verdict == "not exercised" for c in stopped if not c.cases)
    assert report.exit_code == (0 if check(report, "concurrency").cases else 2)


def test_the_bound_on_time_is_kept_and_told():
    with serving(Engine(step_s=0.02)) as server:
        report = run(server, limit_s=2.0)
    assert report.seconds < 2.5
    assert any("limit_s leaves" in c.detail for c in report.checks)
    assert report.error is None


def test_a_server_that_hangs_is_not_audited():
    engine = Engine()
    engine.ready = lambda: False
    with serving(engine) as server:
        report = run(server, limit_s=0.7)
    assert report.exit_code == 2
    assert report.seconds < 3
    assert "no whole answer" in report.error


def test_a_cache_that_is_not_reported_is_told_to_be_possible():
    describe = without("usage", "prompt_tokens_details")
    with serving(CacheMerges(cache=True), describe=describe) as server:
        report = run(server)
    assert report.cause.relation == "repeat"
    assert "may also be its cache" in report.cause.detail
    assert "reports no usage" in check(report, "cache").detail


def test_a_prompt_that_the_cache_knows_already_is_told():
    with serving(Engine(cache=True)) as server:
        assert check(run(server, max_concurrency=2), "cache").cases == 3
        again = check(run(server, max_concurrency=2), "cache")
        assert (again.verdict, again.detail) == (
            "not exercised", "the first answers already came from the cache: take another seed"
        )  # fmt: skip
        assert check(run(server, max_concurrency=2, seed=1), "cache").cases == 3


def test_prompts_fit_the_model():
    with serving(Engine(), max_model_len=128) as server:
        assert run(server).exit_code == 0
    assert 40 < server.engine.longest <= 64


def test_degenerate_answers_are_told():
    def flat(sequence):
        answer = completion(sequence)
        answer["choices"][0]["logprobs"]["top_logprobs"] = [{" a": -1.5, " b": -1.5}] * 4
        return answer

    with serving(Engine(), describe=flat) as server:
        assert any("dummy weights" in gap for gap in run(server, max_concurrency=2).not_observed)


def answer(**changed):
    logprobs = {
        "tokens": ["a", "b"],
        "token_logprobs": [-0.5, -1.5],
        "top_logprobs": [{"a": -0.5, "c": -3}, {"b": -1.5}],
    }
    choice = {"text": "ab", "finish_reason": "length", "logprobs": logprobs | changed.pop("logprobs", {})} | changed
    return _read(json.dumps({"choices": [choice]}), 0.0, 1.0, COMPLETIONS)


@pytest.mark.parametrize(
    ("changed", "output", "index"),
    [
        ({"logprobs": {"tokens": ["a", "c"]}}, "tokens", 1),
        ({"logprobs": {"tokens": ["a"]}}, "tokens", 1),
        ({"logprobs": {"token_logprobs": [-0.5000000000000001, -1.5]}}, "logprobs", 0),
        ({"logprobs": {"token_logprobs": [-0.5, float("nan")]}}, "logprobs", 1),
        ({"logprobs": {"top_logprobs": [{"c": -3, "a": -0.5}, {"b": -1.25}]}}, "top logprobs", 2),
        ({"text": "aB"}, "text", 0),
        ({"finish_reason": "stop"}, "finish reason", 0),
    ],
)
def test_answers_are_compared_exactly(changed, output, index):
    found = difference("short", answer(), answer(**changed))
    assert (found.output, found.index) == (f"{output} of the short probe", (index,))
    assert difference("short", answer(**changed), answer(**changed)) is None


def test_chat_says_the_same_of_a_server_as_completions(capsys):
    with serving(HalvesFromFive(quiet_s=0.03)) as varies, serving(Engine(quiet_s=0.03)) as holds:
        report = run(varies, max_concurrency=8, chat=True)
        assert (report.cause.relation, report.cause.threshold) == ("concurrency", 5)
        exec(report.reproduction, {})
        assert "/v1/chat/completions" in report.reproduction
        assert capsys.readouterr().out.startswith("differs:\n")
        exec(report.reproduction.replace(str(varies.server_port), str(holds.server_port)), {})
        assert capsys.readouterr().out.startswith("the same\n")
        assert run(holds, chat=True).verdict == "holds"


def test_a_chat_answer_holds_what_a_completion_does():
    top = [{"token": "a", "logprob": -0.5}, {"token": "b", "logprob": -1.0}]
    content = [{"token": "a", "logprob": -0.5, "top_logprobs": top}]
    choice = {"message": {"content": "a"}, "finish_reason": "stop", "logprobs": {"content": content}}
    chat = _read(json.dumps({"choices": [choice]}), 0.0, 1.0, CHAT)
    logprobs = {"tokens": ["a"], "token_logprobs": [-0.5], "top_logprobs": [{"a": -0.5, "b": -1.0}]}
    plain = {"text": "a", "finish_reason": "stop", "logprobs": logprobs}
    assert chat == _read(json.dumps({"choices": [plain]}), 0.0, 1.0, COMPLETIONS)
    for absent in (None, {}, {"content": None}, {"content": []}):
        failure = _read(json.dumps({"choices": [choice | {"logprobs": absent}]}), 0.0, 1.0, CHAT)
        assert "an answer without logprobs" in failure.reason
