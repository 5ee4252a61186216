"""What ACME keeps on disk, the locks around it, and the certificate directory as it writes it."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from portero_py.control.acme.files import Account, AcmeFiles, write
from portero_py.control.acme.folder import CertificateFolder
from portero_py.control.acme.locks import LEASE, Lock, account_in_use
from portero_py.core.acme.progress import Progress
from portero_py.core.certificate_pairs import parse_pair
from portero_py.core.certificates import Certificate
from portero_py.demo.self_signed import Authority
from portero_py.errors import Busy, StateUnwritable

AUTHORITY = Authority()
NAME = "a.example"


def certificate(name: str = NAME) -> Certificate:
    pair = AUTHORITY.issue(name)
    return parse_pair(name, pair.chain_pem, pair.key_pem, "here")


@pytest.fixture
def files(tmp_path: Path) -> AcmeFiles:
    return AcmeFiles(tmp_path / "state", "https://ca.example/dir")


@pytest.fixture
def folder(tmp_path: Path) -> CertificateFolder:
    (tmp_path / "certs").mkdir()
    return CertificateFolder(tmp_path / "certs")


# Files


def test_what_is_kept_is_found_again(files: AcmeFiles, tmp_path: Path) -> None:
    assert (files.account(), files.names(), files.order_key(NAME), files.pair(NAME)) == (None, [], None, None)
    assert files.progress(NAME) == Progress()
    issued = certificate()
    files.save_account(Account(b"key", "https://ca/1", b"next"))
    files.save_progress(NAME, Progress(failures=3))
    files.save_order_key(NAME, b"key")
    files.save_pair(NAME, issued.chain_pem, issued.key_pem)
    again = AcmeFiles(tmp_path / "state", "https://ca.example/dir")
    assert again.account() == Account(b"key", "https://ca/1", b"next")
    assert again.progress(NAME).failures == 3
    assert again.order_key(NAME) == b"key"
    found = again.pair(NAME)
    assert found is not None
    assert found.same_bytes(issued)
    assert again.names() == [NAME]
    assert AcmeFiles(tmp_path / "state", "https://other.example/dir").account() is None


def test_everything_is_for_its_owner_only(files: AcmeFiles, tmp_path: Path) -> None:
    former = os.umask(0)
    try:
        files.save_account(Account(b"key"))
        files.save_order_key(NAME, b"key")
        Lock(files.lock(NAME)).acquire(0.0)
    finally:
        os.umask(former)
    for path in (tmp_path / "state").rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


def test_a_full_disk_leaves_the_old_file(files: AcmeFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    files.save_progress(NAME, Progress(failures=1))

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StateUnwritable, match="No space left"):
        files.save_progress(NAME, Progress(failures=2))
    assert files.progress(NAME).failures == 1
    assert [path.name for path in files.lock(NAME).parent.iterdir()] == ["progress.json"]


def test_a_link_in_place_of_the_new_file_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / ".f.part").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StateUnwritable):
        write(tmp_path / "f", b"secret")
    assert not (tmp_path / "elsewhere").exists()


def test_damaged_progress_counts_as_none(files: AcmeFiles, caplog: pytest.LogCaptureFixture) -> None:
    for text in (b"", b"{", b'{"step": 5}', b"\xff"):
        write(files.root / NAME / "progress.json", text)
        assert files.progress(NAME) == Progress()
    write(files.root / NAME / "pair.pem", b"-----BEGIN")
    assert files.pair(NAME) is None
    assert caplog.text.count("is damaged") == 5


def test_a_damaged_account_is_not_replaced_by_a_new_one(files: AcmeFiles) -> None:
    for text in (b"", b"[]", b'{"url": 1}', b'{"key": 1, "url": ""}'):
        write(files.root / "account.json", text)
        with pytest.raises(StateUnwritable, match="restore or remove it"):
            files.account()


def test_no_key_is_shown() -> None:
    assert "secret" not in repr(Account(b"secret", "url", b"secret"))


# Locks


def test_two_in_one_process_exclude_each_other(files: AcmeFiles) -> None:
    first, second = Lock(files.lock(NAME)), Lock(files.lock(NAME))
    first.acquire(0.0)
    with pytest.raises(Busy):
        second.acquire(LEASE * 10)  # one kernel: the lease does not matter
    first.release()
    second.acquire(1.0)
    second.release()
    second.release()


def test_the_lock_of_a_process_that_died_is_free_at_once(files: AcmeFiles) -> None:
    path = files.lock(NAME)
    code = (
        "import os, sys; from pathlib import Path; from portero_py.control.acme.locks import Lock; "
        "Lock(Path(sys.argv[1])).acquire(1e12); os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(path)], check=False).returncode == -9
    assert json.loads(path.read_text())["until"] == 1e12 + LEASE
    Lock(path).acquire(0.0)


def test_another_machine_s_lease_is_respected_until_it_ends(files: AcmeFiles) -> None:
    path = files.lock(NAME)
    other = Lock(path, owner="another kernel")
    other.acquire(1000.0)
    os.close(other._descriptor)  # flock does not reach from there to here
    with pytest.raises(Busy, match="another machine"):
        Lock(path).acquire(1000.0 + LEASE - 1)
    Lock(path).acquire(1000.0 + LEASE)


def test_a_lease_can_be_renewed(files: AcmeFiles) -> None:
    lock = Lock(files.lock(NAME))
    lock.acquire(5.0)
    lock.renew(100.0)
    assert json.loads(files.lock(NAME).read_text())["until"] == 100 + LEASE
    lock.release()
    assert files.lock(NAME).read_text() == ""


def test_a_torn_lease_is_none(files: AcmeFiles) -> None:
    for text in (b"{", b"[]", b'{"until": "x", "owner": "y"}', b"null"):
        write(files.lock(NAME), text)
        lock = Lock(files.lock(NAME))
        lock.acquire(0.0)
        lock.release()


def test_the_account_is_used_by_many_or_changed_by_one(files: AcmeFiles) -> None:
    path = files.account_lock
    shared = account_in_use(path)
    with shared, account_in_use(path), pytest.raises(Busy), account_in_use(path, exclusive=True):
        pass
    with account_in_use(path, exclusive=True), pytest.raises(Busy), account_in_use(path):
        pass


# The certificate directory


def test_an_installed_pair_is_known_as_portero_s(folder: CertificateFolder, tmp_path: Path) -> None:
    assert folder.served(NAME) == (None, True)
    for _ in range(3):
        issued = certificate()
        folder.install(issued)
        served, is_ours = folder.served(NAME)
        assert served is not None
        assert (served.fingerprint, is_ours) == (issued.fingerprint, True)
    assert (tmp_path / "certs" / NAME / "fullchain.pem").read_bytes() == issued.chain_pem
    assert stat.S_IMODE((tmp_path / "certs" / NAME / "privkey.pem").stat().st_mode) == 0o600


def test_whatever_somebody_else_put_there_is_not(folder: CertificateFolder, tmp_path: Path) -> None:
    pair = AUTHORITY.issue(NAME)
    certs = tmp_path / "certs"

    def leaf_only(path: Path) -> None:
        path.mkdir()
        (path / "cert.pem").write_bytes(pair.chain_pem)

    def key_only(path: Path) -> None:
        path.mkdir()
        (path / "privkey.pem").write_bytes(pair.key_pem)

    def garbage(path: Path) -> None:
        path.mkdir()
        (path / "fullchain.pem").write_bytes(b"half")

    def over_ours(path: Path) -> None:
        folder.install(certificate())
        pair.write(path)

    for made, put in (
        (NAME, pair.write),
        (NAME, leaf_only),
        (NAME, key_only),
        (NAME, garbage),
        (NAME, over_ours),
        ("A.Example", pair.write),
        (f"{NAME}.pem", lambda path: path.write_bytes(pair.key_pem + pair.chain_pem)),
    ):
        put(certs / made)
        assert not folder.served(NAME)[1], (made, put)
        subprocess.run(["rm", "-r", str(certs / made)], check=True)
    assert folder.served(NAME) == (None, True)


def test_an_installation_that_broke_off_is_still_portero_s(folder: CertificateFolder, tmp_path: Path) -> None:
    first, second = certificate(), certificate()
    path = tmp_path / "certs" / NAME
    folder.install(first)
    chain = (path / "fullchain.pem").read_bytes()
    folder.install(second)
    (path / "fullchain.pem").write_bytes(chain)  # mark and key are the new ones'
    served, is_ours = folder.served(NAME)
    assert served is not None
    assert (served.fingerprint, is_ours) == (first.fingerprint, True)
    (path / "fullchain.pem").unlink()  # the same, the first time
    assert folder.served(NAME) == (None, True)


def test_an_empty_folder_and_a_damaged_mark_are_nothing(folder: CertificateFolder, tmp_path: Path) -> None:
    path = tmp_path / "certs" / NAME
    path.mkdir()
    for text in ("{", "{}", "[1]"):
        (path / ".portero-acme").write_text(text)
        assert folder.served(NAME) == (None, True)
        folder.install(certificate())
        assert folder.served(NAME)[1]
        (path / "fullchain.pem").unlink()
        (path / "privkey.pem").unlink()


def test_a_directory_that_cannot_be_read_says_so(tmp_path: Path) -> None:
    with pytest.raises(StateUnwritable, match="cannot read"):
        CertificateFolder(tmp_path / "gone").served(NAME)


# What cannot be read


@pytest.mark.parametrize(
    "text", [b"[" * 200000, b'{"retry_at": 1%s}' % (b"0" * 400), b'{"retry_at": Infinity}']
)
def test_progress_that_no_reader_can_bear_counts_as_none(files: AcmeFiles, text: bytes) -> None:
    write(files.root / NAME / "progress.json", text)
    assert files.progress(NAME) == Progress()


def test_nothing_waits_for_the_writer_of_a_fifo(
    files: AcmeFiles, folder: CertificateFolder, tmp_path: Path
) -> None:
    (files.root / NAME).mkdir(parents=True)
    (tmp_path / "certs" / NAME).mkdir()
    for path in (files.root / NAME / "progress.json", tmp_path / "certs" / NAME / "fullchain.pem"):
        os.mkfifo(path)
    with pytest.raises(StateUnwritable, match="is not a regular file"):
        files.progress(NAME)
    with pytest.raises(StateUnwritable, match="is not a regular file"):
        folder.served(NAME)
    os.mkfifo(files.root / NAME / ".order.key.part")
    with pytest.raises(StateUnwritable, match="cannot write"):
        files.save_order_key(NAME, b"key")
    files.save_order_key(NAME, b"key")  # it was put out of the way


def test_a_mark_or_an_account_that_nests_too_deeply_is_damaged(
    files: AcmeFiles, folder: CertificateFolder, tmp_path: Path
) -> None:
    write(files.root / "account.json", b"[" * 200000)
    with pytest.raises(StateUnwritable, match="is damaged"):
        files.account()
    folder.install(certificate())
    (tmp_path / "certs" / NAME / ".portero-acme").write_bytes(b"[" * 200000)
    assert folder.served(NAME)[1] is False


@pytest.mark.parametrize(
    "lease",
    [b"[" * 4000, b'{"owner": "x", "until": 1%s}' % (b"0" * 400), b'{"owner": "x", "until": Infinity}'],
    ids=["nested", "large", "infinite"],
)
def test_a_lock_file_whose_bytes_are_no_lease_says_nothing(files: AcmeFiles, lease: bytes) -> None:
    path = files.lock(NAME)
    write(path, lease)
    lock = Lock(path)
    lock.acquire(0.0)
    lock.release()


def test_a_fifo_is_no_lock(files: AcmeFiles) -> None:
    (files.root / NAME).mkdir(parents=True)
    os.mkfifo(files.lock(NAME))
    with pytest.raises(StateUnwritable, match="is not a regular file"):
        Lock(files.lock(NAME)).acquire(0.0)


def test_a_lock_that_is_given_back_while_it_is_taken_is_free(
    files: AcmeFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, flock = Lock(files.lock(NAME)), fcntl.flock

    def release_meanwhile(descriptor: int, operation: int) -> None:
        flock(descriptor, operation)
        lock.release()

    monkeypatch.setattr(fcntl, "flock", release_meanwhile)
    lock.acquire(0.0)
    monkeypatch.setattr(fcntl, "flock", flock)
    assert lock._descriptor == -1
    other = Lock(files.lock(NAME))
    other.acquire(0.0)
    other.release()


def test_a_renewal_writes_to_no_file_that_is_closed(
    files: AcmeFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, truncate = Lock(files.lock(NAME)), os.ftruncate
    lock.acquire(0.0)
    descriptor = lock._descriptor

    def release_meanwhile(number: int, length: int) -> None:
        monkeypatch.setattr(os, "ftruncate", truncate)
        lock.release()
        truncate(number, length)  # raises where it is closed

    monkeypatch.setattr(os, "ftruncate", release_meanwhile)
    lock.renew(1.0)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)
    lock.renew(2.0)
    assert files.lock(NAME).read_bytes() == b""


# Wildcards


def test_a_wildcard_has_folders_without_a_star(
    files: AcmeFiles, folder: CertificateFolder, tmp_path: Path
) -> None:
    name = "*.a.example"
    files.save_progress(name, Progress(failures=1))
    assert files.names() == [name]
    assert files.progress(name).failures == 1
    issued = certificate(name)
    folder.install(issued)
    assert [path.name for path in (tmp_path / "certs").iterdir()] == ["_wildcard.a.example"]
    assert not [path for path in tmp_path.rglob("*") if "*" in path.name]
    found, is_ours = folder.served(name)
    assert found is not None
    assert (found.fingerprint, is_ours) == (issued.fingerprint, True)


@pytest.mark.parametrize("spelled", ["*.a.example", "_WILDCARD.A.example"])
def test_a_wildcard_s_folder_of_somebody_else_s_is_left_alone(
    folder: CertificateFolder, tmp_path: Path, spelled: str
) -> None:
    AUTHORITY.issue("*.a.example").write(tmp_path / "certs" / spelled)
    _, is_ours = folder.served("*.a.example")
    assert not is_ours
