"""Host names, origins, passwords and proxies decide who may use the server, and as which visitor."""

from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from websockets.exceptions import InvalidStatus

from pipeline.serving.guard import LOOPBACK, Access
from pipeline.serving.limits import Limits
from pipeline.serving.passwords import Passwords
from tests.serving.served import Client

LOCKED = Access(LOOPBACK, accounts=("me:secret",))
BAD_ORIGINS = ["http://[", "http://]", "http://[::1", "null", "", "http://evil.example", "javascript:0", "//a@b:c:d"]
BAD_HOSTS = ["[", "]:80", "evil.example", "localhost.evil.example", "[::1", "127.0.0.1.", "localhost@evil"]
BAD_HEADERS = ["Basic", "Basic !!!", "Bearer x", "Basic " + "QQ" * 5000, "basic bWU6", "Digest a=b"]


@pytest.mark.parametrize("origin", BAD_ORIGINS)
def test_an_origin_that_is_not_ours_is_a_refusal(serve, origin):
    site = serve()
    headers = {"origin": origin}
    assert site.http.delete("/api/v1/sessions/x/image", headers=headers).status_code == 403
    with pytest.raises(InvalidStatus) as refused, site.connect(additional_headers=headers):
        pass
    assert refused.value.response.status_code == 403


@pytest.mark.parametrize("host", BAD_HOSTS)
def test_a_host_that_is_not_ours_is_a_refusal(serve, host):
    assert serve().http.get("/healthz", headers={"host": host}).status_code == 403


def test_a_proxy_may_show_the_server_under_its_own_name_and_path(serve):
    """The proxy may keep or remove the path, and it may pass on its host name or not."""
    access = Access((*LOOPBACK, "films.example"), ("films.example",), root_path="/wan")
    site = serve(access=access)
    origin = {"origin": "https://films.example"}
    for headers in ({"host": "films.example"}, {}):
        for path in ("/wan/healthz", "/healthz"):
            assert site.http.get(path, headers=headers).text == "ready\n"
    client = Client(site.connect(additional_headers=origin))
    assert site.http.delete(f"/wan/api/v1/sessions/{client.session}/image", headers=origin).status_code == 204
    assert site.http.get("/wan").headers["location"] == "/wan/"
    assert site.http.get("/wander/healthz").status_code == 404


def test_forwarded_addresses_count_only_if_the_proxy_is_trusted(serve):
    """A stranger cannot choose its visitor address."""
    limits = Limits(requests=0.1, longest_wait=0)  # one, and then one in ten seconds
    for proxies, expected in (((), [200, 429, 429]), (("127.0.0.1",), [200, 200, 200])):
        site = serve(limits=limits, proxies=proxies)
        codes = [
            site.http.get("/api/v1/status", headers={"x-forwarded-for": f"10.0.0.{number}"}).status_code
            for number in range(3)
        ]
        assert codes == expected, proxies


def test_guesses_get_slower_with_every_failure():
    """However many passwords are sent at the same time, only a few of an address are checked in a minute."""
    now = [0.0]
    passwords = Passwords(["me:secret"], clock=lambda: now[0])
    looked_at = 0
    while now[0] < 600:
        if not passwords.wait("1.1.1.1"):
            looked_at += 1
            assert passwords.user_of_password(wrong(), "1.1.1.1") is None
        now[0] += 0.25
    assert looked_at <= 20
    assert passwords.wait("2.2.2.2") == 0


def wrong():
    from starlette.datastructures import Headers

    return Headers({"authorization": httpx.BasicAuth("me", "guess")._auth_header})


def test_of_many_guesses_at_once_few_are_looked_at_and_one_line_is_logged(serve, caplog):
    site = serve(access=LOCKED)

    def guess(_: int) -> int:
        return httpx.get(f"{site.http.base_url}/healthz", auth=("me", "wrong"), trust_env=False).status_code

    with ThreadPoolExecutor(20) as pool:
        codes = list(pool.map(guess, range(20)))
    assert set(codes) == {401, 429} and codes.count(401) <= 3  # looked at
    assert sum("wrong passwords" in record.message for record in caplog.records) == 1
    with site.browser("127.0.0.2") as owner:
        assert owner.get("/healthz", auth=("me", "secret")).status_code == 200


@pytest.mark.parametrize("header", BAD_HEADERS)
def test_a_damaged_authorization_is_a_wrong_password(serve, header):
    assert serve(access=LOCKED).http.get("/healthz", headers={"authorization": header}).status_code == 401


@pytest.mark.parametrize("cookie", ["self_forcing=", "self_forcing=x", "=;;=", "self_forcing", "a" * 4000, '"'])
def test_a_damaged_cookie_is_none(serve, cookie):
    assert serve(access=LOCKED).http.get("/healthz", headers={"cookie": cookie}).status_code == 401
