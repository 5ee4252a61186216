"""What is asked of Docker: versions, addresses, and answers that are of no use."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from portero_py.client.discovery import engine as module
from portero_py.client.discovery.engine import Engine, agree, parse_address
from portero_py.client.discovery.events import Event, Happened
from portero_py.errors import ConfigError, DockerUnreachable
from tests.client.discovery.fake_docker import FakeDocker
from tests.client.discovery.inspections import id_of
from tests.e2e.certificates import Authority


@pytest.fixture
async def docker(tmp_path: Path) -> AsyncIterator[FakeDocker]:
    async with FakeDocker(tmp_path / "docker.sock") as found:
        yield found


@pytest.fixture
async def engine(docker: FakeDocker) -> AsyncIterator[Engine]:
    async with Engine(parse_address(docker.host)) as found:
        yield found


class TestAddress:
    @pytest.mark.parametrize(
        ("host", "url", "socket"),
        [
            ("unix:///var/run/docker.sock", "http://docker", "/var/run/docker.sock"),
            ("tcp://10.0.0.1:2375", "http://10.0.0.1:2375", ""),
            ("tcp://docker/", "http://docker:2375", ""),
            ("http://socket-proxy:80", "http://socket-proxy:80", ""),
            ("tcp://[::1]:1", "http://[::1]:1", ""),
            ("https://docker", "https://docker:2376", ""),
        ],
    )
    def test_what_docker_host_may_say(self, host: str, url: str, socket: str) -> None:
        found = parse_address(host)
        assert (found.shown, found.url, found.socket) == (host, url, socket)

    @pytest.mark.parametrize(
        "host",
        [
            *("", "/var/run/docker.sock", "unix://docker.sock", "ssh://root@host", "npipe:////./pipe/docker"),
            *("tcp://", "tcp://h:x", "tcp://h:99999", "tcp://[x", "tcp://h/path", "tcp://u@h", "tcp://h\n:1"),
        ],
    )
    def test_what_it_may_not_say(self, host: str) -> None:
        with pytest.raises(ConfigError, match=r"^--docker: "):
            parse_address(host)

    def test_tls_wants_a_folder_that_can_be_read(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"^DOCKER_CERT_PATH: "):
            parse_address("tcp://docker", str(tmp_path))
        assert parse_address("unix:///docker.sock", str(tmp_path)).tls is None


class TestVersion:
    @pytest.mark.parametrize(
        ("greatest", "least", "agreed"),
        [
            ("1.41", "1.12", "1.41"),
            ("1.43", "1.24", "1.43"),
            ("1.52", "1.24", "1.43"),
            ("1.99", "1.44", "1.44"),
            ("2.0", "1.90", "1.90"),
            ("1.41", None, "1.41"),
            ("1.60", "x", "1.60"),
            ("x", "1.12", ""),
            (None, None, ""),
            (1.41, 1.12, ""),
        ],
    )
    def test_ours_as_far_as_the_daemon_has_it(self, greatest: object, least: object, agreed: str) -> None:
        assert agree(greatest, least) == agreed

    @pytest.mark.parametrize(("greatest", "least"), [("1.41", "1.12"), ("1.52", "1.44"), ("1.24", "1.12")])
    async def test_every_daemon_takes_it(self, tmp_path: Path, greatest: str, least: str) -> None:
        async with (
            FakeDocker(tmp_path / "docker.sock", greatest, least) as docker,
            Engine(parse_address(docker.host)) as engine,
        ):
            docker.start("web")
            assert (await engine.connect()).startswith("Docker 99.1, API 1.")
            assert [each["Id"] for each in await engine.containers()] == [id_of("web")]

    async def test_one_that_does_not_tell_is_asked_without(self, docker: FakeDocker, engine: Engine) -> None:
        docker.refused["/version"] = 403
        docker.refused["/info"] = 403
        assert await engine.connect() == "Docker, API of its own version"
        assert await engine.info() == {}
        assert await engine.containers() == []
        assert docker.asked == ["/version", "/info", "/containers/json"]


class TestAnswers:
    async def test_a_container_is_found_or_not(self, docker: FakeDocker, engine: Engine) -> None:
        await engine.connect()
        docker.start("web")
        found = await engine.inspect(id_of("web"))
        assert found is not None
        assert found["Name"] == "/web"
        assert await engine.inspect(id_of("db")) is None

    async def test_a_refusal_says_where_and_why(self, docker: FakeDocker, engine: Engine) -> None:
        docker.refused["/containers/json"] = 403
        with pytest.raises(DockerUnreachable) as caught:
            await engine.containers()
        assert str(caught.value) == (
            f"{docker.host}: /containers/json is answered with 403: administrative rules forbid this request"
        )

    async def test_nobody_at_the_socket_is_said_in_a_line(self, tmp_path: Path) -> None:
        async with Engine(parse_address(f"unix://{tmp_path}/none.sock")) as engine:
            with pytest.raises(DockerUnreachable, match=r"none\.sock: .*No such file"):
                await engine.connect()

    async def test_an_answer_that_does_not_come_is_not_waited_for(
        self, docker: FakeDocker, engine: Engine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(module, "ANSWER_SECONDS", 0.05)
        docker.delays["/version"] = 60.0
        with pytest.raises(DockerUnreachable, match="no answer in time"):
            await engine.connect()
        docker.delays["/events"] = 60.0
        with pytest.raises(DockerUnreachable, match="no answer in time"):
            async with engine.events():
                pass

    async def test_an_answer_without_end_is_not_read(
        self, docker: FakeDocker, engine: Engine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(module, "MAX_ANSWER", 10)
        with pytest.raises(DockerUnreachable, match="the answer to /version is too long"):
            await engine.connect()


class TestTcp:
    async def test_docker_is_asked_over_tcp(self, docker: FakeDocker) -> None:
        docker.start("web")
        async with Engine(parse_address(f"tcp://127.0.0.1:{await docker.listen()}")) as engine:
            await engine.connect()
            assert [each["Id"] for each in await engine.containers()] == [id_of("web")]

    async def test_over_tls_both_prove_who_they_are(self, docker: FakeDocker, tmp_path: Path) -> None:
        authority, stranger = Authority(), Authority()
        server = authority.issue("127.0.0.1")
        server.write(tmp_path / "server")
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cadata=authority.pem.decode())
        context.load_cert_chain(tmp_path / "server/fullchain.pem", tmp_path / "server/privkey.pem")
        context.verify_mode = ssl.CERT_REQUIRED
        host = f"tcp://127.0.0.1:{await docker.listen(context)}"
        for name, trusted in (("right", authority), ("stranger", stranger)):
            pair = trusted.issue("client")
            pair.write(tmp_path / name)
            (tmp_path / name / "fullchain.pem").rename(tmp_path / name / "cert.pem")
            (tmp_path / name / "privkey.pem").rename(tmp_path / name / "key.pem")
            (tmp_path / name / "ca.pem").write_bytes(trusted.pem)
        async with Engine(parse_address(host, str(tmp_path / "right"))) as engine:
            assert "API 1.41" in await engine.connect()
        async with Engine(parse_address(host, str(tmp_path / "stranger"))) as engine:
            with pytest.raises(DockerUnreachable, match="certificate"):
                await engine.connect()


class TestEvents:
    async def test_they_come_as_they_happen_in_whatever_pieces(
        self, docker: FakeDocker, engine: Engine, caplog: pytest.LogCaptureFixture
    ) -> None:
        await engine.connect()
        async with engine.events() as stream:
            docker.start("web")
            found = await stream.next()
            assert [each.happened for each in found] == [Happened.STARTED]
            line = b'{"Type":"container","Action":"die","Actor":{"ID":"%s"}}\n' % id_of("web").encode()
            docker.write(line[:20])
            assert await stream.next() == []
            docker.write(line[20:] + b"\r\n" + b"garbage\n" + line)
            ended = Event(Happened.ENDED, id_of("web"))
            assert await stream.next() == [ended, ended]
            docker.write(b"more\n" + line)
            assert await stream.next() == [ended]
        assert caplog.text.count("an event of Docker's is no JSON, and passed over") == 1
        assert "b'garbage'" in caplog.text

    async def test_whoever_gives_up_waiting_loses_none(self, docker: FakeDocker, engine: Engine) -> None:
        await engine.connect()
        async with engine.events() as stream:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.01):
                    await stream.next()
            docker.start("web")
            assert [each.happened for each in await stream.next()] == [Happened.STARTED]

    async def test_a_stream_that_breaks_off_is_an_error(self, docker: FakeDocker, engine: Engine) -> None:
        await engine.connect()
        async with engine.events() as stream:
            docker.break_streams()
            with pytest.raises(DockerUnreachable):
                await stream.next()

    async def test_a_line_without_end_is_an_error(
        self, docker: FakeDocker, engine: Engine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(module, "MAX_EVENT", 10)
        async with engine.events() as stream:
            docker.write(b"x" * 11)
            with pytest.raises(DockerUnreachable, match="an event is too long"):
                await stream.next()

    async def test_a_refusal_is_an_error(self, docker: FakeDocker, engine: Engine) -> None:
        docker.refused["/events"] = 403
        with pytest.raises(DockerUnreachable, match="/events is answered with 403"):
            async with engine.events():
                pass
