"""A server with several models: one is chosen in place of another, and everybody is told."""

import threading

import pytest

from pipeline.serving.guard import LOOPBACK, Access
from tests.serving.served import PATIENCE, Site
from tests.serving.synthetic import SyntheticModel
from utils.errors import UserError

NAMES = ["first", "second"]


class TwoModels(SyntheticModel):
    """The second model has other sizes. Loading waits for `may_load`, and fails for the names in `broken`."""

    def __init__(self) -> None:
        super().__init__(names=list(NAMES))
        self.broken: set[str] = set()
        self.may_load = threading.Event()
        self.may_load.set()

    def choose(self, name: str) -> None:
        super().choose(name)
        self.height = 48 if name == "first" else 64

    def load(self, report) -> None:
        assert self.may_load.wait(PATIENCE)
        if self.chosen in self.broken:
            raise UserError("weights.pt: damaged")


@pytest.fixture
def model() -> TwoModels:
    return TwoModels()


def choose(site: Site, name: str, **headers: str):
    return site.http.put("/api/v1/model", params={"name": name}, headers=headers)


def test_a_choice_ends_every_stream_and_offers_the_other_model(serve, model):
    """The one who watches and the one who waits in line are told. The clip is kept."""
    site = serve(model, max_viewers=1, may_choose=True)
    with site.client() as watching, site.client() as waiting:
        watching.send("start", prompt="numbers")
        watching.frame()
        waiting.send("start", prompt="more numbers")
        waiting.wait_for("waiting")
        assert choose(site, "second").status_code == 202
        for client in (watching, waiting):
            assert "another model was chosen: second" in client.wait_for("notice")["message"]
            client.wait_for("ended")
        watching.wait_for("clip")
        while (status := watching.wait_for("status")).get("options") is None or status["chosen"] != "second":
            pass
        assert status["models"] == NAMES and status["options"]["sizes"] == [[64, 48]]
        waiting.send("start", prompt="numbers", num_frames=3)
        header = waiting.frame()
        assert 64 in header


def test_a_model_that_cannot_be_loaded_leaves_the_first_one(serve, model):
    model.broken = {"second"}
    site = serve(model, may_choose=True)
    with site.client() as client:
        choose(site, "second")
        while "damaged" not in (status := client.wait_for("status"))["problem"]:
            pass
        while status["model"]["state"] != "ready":
            status = client.wait_for("status")
        assert status["chosen"] == "first"
        client.send("start", prompt="numbers")
        assert client.frame()


def test_while_a_model_is_loaded_nothing_else_begins(serve, model):
    site = serve(model, may_choose=True)
    model.may_load.clear()
    try:
        with site.client() as client:
            assert choose(site, "second").status_code == 202
            refused = choose(site, "first")
            assert refused.status_code == 409 and "wait until it is ready" in refused.json()["detail"]
            assert site.http.get("/api/v1/options").status_code == 503
            client.send("start", prompt="numbers")
            assert "still loading" in client.wait_for("error")["message"]
    finally:
        model.may_load.set()


def test_only_who_may_choose_can_choose(serve, model):
    site = serve(model)
    assert choose(site, "second").status_code == 403
    assert site.http.get("/api/v1/status").json()["may_choose"] is False
    site = serve(model, may_choose=True, access=Access(LOOPBACK, accounts=("me:secret",)))
    assert choose(site, "second").status_code == 401
    site = serve(model, may_choose=True)
    assert choose(site, "second", origin="https://evil.example").status_code == 403
    assert choose(site, "third").status_code == 404
    assert model.chosen == "first"


def test_a_start_that_was_on_its_way_is_refused(serve, model):
    """Its settings were checked for the earlier model."""
    site = serve(model, may_choose=True)
    loads = site.server.loads
    choose(site, "second")
    with pytest.raises(UserError, match="start again"):
        site.server.check_same(loads)
