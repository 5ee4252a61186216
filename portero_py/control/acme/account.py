"""The account at the CA: made once, used ever after, its key changed on request.

The key is on the disk before the CA hears of it, when the account is made and when the key is changed. A
change that broke off is completed or undone the next time the account is used: the CA knows which key it has.

Everything here blocks, and loads the `acme` library. Whoever uses a client holds `account_in_use`.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING

from portero_py.control.acme.client import AcmeClient
from portero_py.control.acme.files import Account, AcmeFiles
from portero_py.control.acme.locks import account_in_use
from portero_py.control.acme.pairs import new_key

if TYPE_CHECKING:
    from portero_py.config.model import Acme as AcmeConfig

_log = logging.getLogger(__name__)


def open_client(config: AcmeConfig, files: AcmeFiles) -> AcmeClient:
    """A client whose account exists; the caller closes it. Raises AcmeError."""
    account = files.account()
    if account is None:
        account = Account(new_key())
        files.save_account(account)
    if account.next_key_pem:
        account = _decided(config, files, account)
    client = AcmeClient(config.directory, account.key_pem, account.url, ca_file=config.ca_file)
    if not account.url:
        try:
            terms = client.terms_of_service
            url = client.register(config.email, config.eab_kid, config.eab_hmac)
        except BaseException:  # raised on: nobody else closes the client
            client.close()
            raise
        files.save_account(replace(account, url=url))
        _log.info("ACME account %s; its terms of service, agreed to: %s", url, terms or "none")
    return client


def forget_address(files: AcmeFiles) -> None:
    """The CA does not know the account any more: it is registered anew, with the same key, when needed."""
    account = files.account()
    if account is not None:
        files.save_account(replace(account, url=""))


def change_key(config: AcmeConfig, files: AcmeFiles) -> str:
    """Give the account a fresh key; returns its address. Raises AcmeError, Busy while an order goes on."""
    with account_in_use(files.account_lock, exclusive=True):
        client = open_client(config, files)
        try:
            account = files.account()
            assert account is not None
            fresh = new_key()
            files.save_account(replace(account, next_key_pem=fresh))
            client.change_key(fresh)
            files.save_account(Account(fresh, account.url))
            return account.url
        finally:
            client.close()


# Private


def _decided(config: AcmeConfig, files: AcmeFiles, account: Account) -> Account:
    """After a change of the key that broke off: the key that the CA has."""
    client = AcmeClient(config.directory, account.next_key_pem, ca_file=config.ca_file)
    try:
        was_taken = client.has_account()
        account = (
            Account(account.next_key_pem, client.account)
            if was_taken
            else Account(account.key_pem, account.url)
        )
    finally:
        client.close()
    files.save_account(account)
    _log.info("a change of the ACME account's key was %s", "completed" if was_taken else "undone")
    return account
