"""What Docker tells is what the registration API has. Both speak real HTTP; one has no containers."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from portero_py.client.discovery import docker as module
from portero_py.client.discovery.containers import Options, parse
from portero_py.client.discovery.docker import Discovery
from portero_py.client.discovery.engine import Engine, parse_address
from portero_py.client.discovery.keepers import Keepers
from portero_py.errors import RegistrationRefused
from tests.client.discovery.conftest import RealApi
from tests.client.discovery.fake_docker import FakeDocker
from tests.client.discovery.inspections import id_of

WEB, OTHER = "172.17.0.2:8080", "172.17.0.3:8080"
AT_OTHER = {"bridge": "172.17.0.3"}


@pytest.fixture
async def docker(tmp_path: Path) -> AsyncIterator[FakeDocker]:
    async with FakeDocker(tmp_path / "docker.sock") as found:
        yield found


@contextlib.asynccontextmanager
async def discovering(docker: FakeDocker, api: RealApi, **more: Any) -> AsyncIterator[asyncio.Task[None]]:
    """It runs, and has been told what there is."""
    options = Options(ttl_seconds=more.pop("ttl_seconds", 60))
    async with Engine(parse_address(docker.host)) as engine, Keepers(api.api) as keepers:
        running = asyncio.create_task(Discovery(engine, options, keepers, **more).run())
        try:
            await api.until(docker.is_watched)
            yield running
        finally:
            assert not running.done(), running
            running.cancel()
            await asyncio.wait({running})


@pytest.fixture
async def running(docker: FakeDocker, api: RealApi) -> AsyncIterator[None]:
    async with discovering(docker, api):
        yield


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The warnings and errors of ours: a busy machine makes asyncio's own debugging speak, too."""
    return [
        record.getMessage()
        for record in caplog.records
        if record.levelno >= logging.WARNING and record.name.startswith("portero_py.")
    ]


@pytest.mark.usefixtures("running")
class TestWhatContainersDo:
    async def test_a_container_is_registered_when_it_starts(self, docker: FakeDocker, api: RealApi) -> None:
        docker.start("web")
        await api.until_served(app_example=[WEB])

    async def test_replicas_take_turns(self, docker: FakeDocker, api: RealApi) -> None:
        docker.start("web")
        docker.start("other", networks=AT_OTHER)
        await api.until_served(app_example=[WEB, OTHER])
        docker.end("web", remove=True)
        await api.until_served(app_example=[OTHER])

    async def test_one_container_may_serve_several_names(self, docker: FakeDocker, api: RealApi) -> None:
        docker.start("web", {"portero.service": "a.example,b.example", "portero.c.service": "c.example"})
        await api.until_served(a_example=[WEB], b_example=[WEB], c_example=[WEB])
        docker.end("web")
        await api.until_served()

    async def test_it_leaves_when_it_is_told_to_end_not_when_it_has(
        self, docker: FakeDocker, api: RealApi
    ) -> None:
        docker.start("web")
        docker.start("other", networks=AT_OTHER)
        await api.until_served(app_example=[WEB, OTHER])
        docker.signal("web", 1)
        docker.signal("other", 15)
        await api.until_served(app_example=[WEB])
        # It still runs, and says so.
        docker.health("other", "healthy")
        docker.start("web", {"portero.service": "more.example"})
        await api.until_served(more_example=[WEB])
        docker.end("other")
        docker.start("other", networks=AT_OTHER)
        await api.until_served(more_example=[WEB], app_example=[OTHER])

    async def test_one_with_a_health_check_takes_requests_while_it_is_healthy(
        self, docker: FakeDocker, api: RealApi
    ) -> None:
        docker.start("web", health="starting")
        docker.start("other", networks=AT_OTHER)
        await api.until_served(app_example=[OTHER])
        docker.health("web", "healthy")
        await api.until_served(app_example=[WEB, OTHER])
        docker.health("web", "unhealthy")
        await api.until_served(app_example=[OTHER])
        docker.health("web", "healthy")
        await api.until_served(app_example=[WEB, OTHER])

    async def test_a_paused_one_takes_none(self, docker: FakeDocker, api: RealApi) -> None:
        docker.start("web")
        await api.until_served(app_example=[WEB])
        docker.pause("web")
        await api.until_served()
        docker.pause("web", paused=False)
        await api.until_served(app_example=[WEB])

    async def test_one_that_moves_is_followed(self, docker: FakeDocker, api: RealApi) -> None:
        docker.start("network")
        await api.until_served(app_example=[WEB])
        docker.move("network", AT_OTHER)
        await api.until_served(app_example=[OTHER])

    async def test_one_in_another_s_network_is_where_that_one_is(
        self, docker: FakeDocker, api: RealApi
    ) -> None:
        docker.start("vpn", {}, networks=AT_OTHER)
        docker.start("app", networks={}, mode=f"container:{id_of('vpn')}")
        await api.until_served(app_example=[OTHER])

    async def test_what_is_unusable_is_one_warning_and_the_others_are_served(
        self, docker: FakeDocker, api: RealApi, caplog: pytest.LogCaptureFixture
    ) -> None:
        docker.start("bad", {"portero.service": "app.example", "portero.port": "http"})
        docker.start("none", {"com.example": "x"})
        docker.start("web")
        await api.until_served(app_example=[WEB])
        for _ in range(3):
            docker.pause("bad")
            docker.pause("bad", paused=False)
        docker.pause("web")
        await api.until_served()
        assert messages(caplog) == [
            f'bad ({id_of("bad")[:12]}): portero.port: "http" is no whole number from 1 to 65535'
        ]

    async def test_what_the_api_refuses_is_one_error_and_the_others_are_served(
        self, docker: FakeDocker, api: RealApi, caplog: pytest.LogCaptureFixture
    ) -> None:
        docker.start("bad", {"portero.service": "bad.example"}, networks={"bridge": "10.9.9.9"})
        docker.start("web", networks=AT_OTHER)
        await api.until_served(app_example=[OTHER])
        await api.until(lambda: messages(caplog))
        await api.until_answered("backend_refused", 2)
        assert len(messages(caplog)) == 1
        assert (
            f"bad ({id_of('bad')[:12]}): bad.example at 10.9.9.9:8080 is not registered"
            in messages(caplog)[0]
        )
        assert "--backend-cidr" in messages(caplog)[0]


class TestReconciling:
    async def test_what_runs_already_is_found(self, docker: FakeDocker, api: RealApi) -> None:
        docker.start("web")
        docker.start("db", {"com.example": "x"})
        async with discovering(docker, api):
            await api.until_served(app_example=[WEB])
        assert not [path for path in docker.asked if id_of("db") in path]

    async def test_a_stream_that_broke_costs_nothing_and_what_was_missed_is_made_good(
        self, docker: FakeDocker, api: RealApi, caplog: pytest.LogCaptureFixture
    ) -> None:
        docker.start("web")
        docker.start("other", networks=AT_OTHER)
        async with discovering(docker, api):
            await api.until_served(app_example=[WEB, OTHER])
            docker.refused["/events"] = 500
            docker.break_streams()
            await api.until(lambda: not docker.streams)
            docker.end("web", remove=True)
            docker.start("new", networks={"bridge": "172.17.0.4"})
            await api.until(lambda: "/events is answered with 500" in caplog.text)
            assert api.served() == {"app.example": [WEB, OTHER]}
            del docker.refused["/events"]
            await api.until_served(app_example=[OTHER, "172.17.0.4:8080"])

    async def test_a_docker_that_is_gone_ends_no_lease(
        self, docker: FakeDocker, api: RealApi, caplog: pytest.LogCaptureFixture
    ) -> None:
        docker.start("web")
        async with discovering(docker, api, ttl_seconds=4):
            await api.until_served(app_example=[WEB])
            await docker.close()
            await api.until(lambda: "No such file" in caplog.text)
            await api.until_answered("renewed", 5)  # longer than its lease
            assert api.served() == {"app.example": [WEB]}
            assert len([each for each in messages(caplog) if "No such file" in each]) == 1
            await docker.open()
            docker.end("web")
            await api.until_served()

    async def test_a_docker_that_comes_later_is_waited_for(
        self, docker: FakeDocker, api: RealApi, caplog: pytest.LogCaptureFixture
    ) -> None:
        await docker.close()
        docker.start("web")
        async with Engine(parse_address(docker.host)) as engine, Keepers(api.api) as keepers:
            running = asyncio.create_task(Discovery(engine, Options(), keepers).run())
            await api.until(lambda: messages(caplog))
            await docker.open()
            await api.until_served(app_example=[WEB])
            running.cancel()
            await asyncio.wait({running})

    async def test_a_lost_event_is_made_good_by_the_next_listing(
        self, docker: FakeDocker, api: RealApi
    ) -> None:
        async with discovering(docker, api, relist_seconds=0.1):
            docker.start("web")
            await api.until_served(app_example=[WEB])
            streams, docker.streams = docker.streams, set()
            docker.end("web")
            docker.streams = streams
            await api.until_served()

    async def test_a_slow_answer_that_was_overtaken_is_not_believed(
        self, docker: FakeDocker, api: RealApi
    ) -> None:
        docker.start("other", networks=AT_OTHER)
        async with discovering(docker, api):
            await api.until_served(app_example=[OTHER])
            docker.delays["/json"] = 0.2
            docker.start("web")
            path = f"/v1.41/containers/{id_of('web')}/json"
            await api.until(lambda: path in docker.asked)
            docker.signal("web", 15)
            # The look that was under way, and the one that followed, are over.
            await api.until(lambda: docker.asked.count(path) == 2)
            docker.delays.clear()
            docker.start("third", networks={"bridge": "172.17.0.4"})
            await api.until_served(app_example=[OTHER, "172.17.0.4:8080"])

    async def test_a_look_that_fails_is_done_again(
        self, docker: FakeDocker, api: RealApi, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(module, "AFTER_LOOK", 0.01)
        async with discovering(docker, api):
            docker.refused[f"{id_of('web')}/json"] = 500
            docker.start("web")
            docker.start("other", networks=AT_OTHER)
            await api.until_served(app_example=[OTHER])
            docker.refused.clear()
            await api.until_served(app_example=[WEB, OTHER])

    async def test_a_look_that_keeps_failing_is_one_line(
        self,
        docker: FakeDocker,
        api: RealApi,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        monkeypatch.setattr(module, "AFTER_LOOK", 0.01)
        async with discovering(docker, api):
            path = f"{id_of('web')}/json"
            docker.refused[path] = 500
            docker.start("web")
            await api.until(lambda: sum(each.endswith(path) for each in docker.asked) > 10)
            said = [each for each in messages(caplog) if "cannot be looked at" in each]
            assert len(said) == 1, said
            # Docker is away altogether: that is said once too, and the looks go on in silence.
            await docker.close()
            await api.until(lambda: "it is tried again, leases are kept" in caplog.text)
            await asyncio.sleep(0.3)
            assert len(messages(caplog)) < 6, messages(caplog)
            await docker.open()
            docker.refused.clear()
            await api.until_served(app_example=[WEB])

    async def test_a_fault_of_our_own_ends_nothing(
        self,
        docker: FakeDocker,
        api: RealApi,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        def broken(said: Any) -> Any:
            if said["Name"] == "/bad":
                raise ZeroDivisionError
            return parse(said)

        monkeypatch.setattr("portero_py.client.discovery.docker.parse", broken)
        async with discovering(docker, api):
            docker.start("bad")
            await api.until(lambda: "could not be seen to" in caplog.text)
            docker.start("web")
            await api.until_served(app_example=[WEB])


class TestRestarts:
    async def test_a_restart_leaves_the_leases_and_gives_back_what_has_ended_meanwhile(
        self, docker: FakeDocker, api: RealApi
    ) -> None:
        docker.start("web")
        docker.start("other", networks=AT_OTHER)
        async with discovering(docker, api):
            await api.until_served(app_example=[WEB, OTHER])
        assert api.served() == {"app.example": [WEB, OTHER]}
        docker.end("web")
        async with discovering(docker, api):
            await api.until_served(app_example=[OTHER])

    async def test_what_another_docker_s_containers_have_is_left_alone(
        self, docker: FakeDocker, api: RealApi
    ) -> None:
        docker.start("web")
        async with discovering(docker, api):
            await api.until_served(app_example=[WEB])
        docker.name = "another"
        docker.containers.clear()
        docker.start("other", networks=AT_OTHER)
        async with discovering(docker, api):
            await api.until_served(app_example=[WEB, OTHER])
            await asyncio.sleep(0.3)
            assert api.served() == {"app.example": [WEB, OTHER]}

    async def test_a_docker_without_a_name_gives_nothing_back(self, docker: FakeDocker, api: RealApi) -> None:
        docker.refused["/info"] = 403
        docker.start("web")
        async with discovering(docker, api):
            await api.until_served(app_example=[WEB])
        docker.containers.clear()
        docker.start("other", networks=AT_OTHER)
        async with discovering(docker, api):
            await api.until_served(app_example=[WEB, OTHER])

    async def test_a_proxy_that_comes_back_empty_has_them_again_at_once(
        self, docker: FakeDocker, api: RealApi, caplog: pytest.LogCaptureFixture
    ) -> None:
        for number in range(2, 12):
            docker.start(f"web{number}", networks={"bridge": f"172.17.0.{number}"})
        wanted = sorted(f"172.17.0.{number}:8080" for number in range(2, 12))
        async with discovering(docker, api, ttl_seconds=9):
            await api.until_served(app_example=wanted)
            await api.close()
            docker.start("late", networks=AT_OTHER, labels={"portero.service": "late.example"})
            await api.until(lambda: "does not answer" in caplog.text)
            await api.open()
            await api.until_served(app_example=wanted, late_example=[OTHER])
            assert len([each for each in messages(caplog) if "does not answer" in each]) == 1

    async def test_a_proxy_that_does_not_answer_leaves_them_to_the_next_run(
        self, docker: FakeDocker, api: RealApi
    ) -> None:
        docker.start("web")
        async with discovering(docker, api):
            await api.until_served(app_example=[WEB])
        docker.end("web")
        port, api.port = api.port, 1
        async with discovering(docker, api) as running:
            await asyncio.sleep(0.3)
            assert not running.done()
        api.port = port
        assert api.served() == {"app.example": [WEB]}
        async with discovering(docker, api):
            await api.until_served()

    @pytest.mark.parametrize("listing", [{"services": None}, {"services": [{"backends": [{}]}]}, {}])
    async def test_a_listing_that_is_none_ends_nothing(
        self, docker: FakeDocker, api: RealApi, monkeypatch: pytest.MonkeyPatch, listing: dict[str, Any]
    ) -> None:
        asked: list[str] = []

        async def strange(session: Any, method: str, url: str, path: str, *_: Any, **__: Any) -> Any:
            asked.append(path)
            return listing

        monkeypatch.setattr("portero_py.client.discovery.keepers.call", strange)
        async with discovering(docker, api):
            await api.until(lambda: asked)
            docker.start("web")
            await api.until_served(app_example=[WEB])

    async def test_a_proxy_that_is_busy_is_asked_again_for_what_is_to_be_given_back(
        self, docker: FakeDocker, api: RealApi, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        docker.start("web")
        async with discovering(docker, api):
            await api.until_served(app_example=[WEB])
        docker.end("web")
        refusals = [429, 503]
        release = Keepers.release_others

        async def busy(self: Keepers, prefix: str) -> Any:
            if refusals:
                raise RegistrationRefused("busy", refusals.pop(), 0.01)
            return await release(self, prefix)

        monkeypatch.setattr(Keepers, "release_others", busy)
        async with discovering(docker, api):
            await api.until_served()
        assert not refusals
