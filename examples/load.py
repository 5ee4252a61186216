"""Clients that ask all the time, and a line every second: how many answers by whom, and how many were lost.

python examples/load.py http://127.0.0.1:8080/ app.localhost
"""

from __future__ import annotations

import asyncio
import sys
from collections import Counter

import aiohttp

CLIENTS = 8
SECONDS = 30


async def ask(url: str, host: str, answers: Counter[str]) -> None:
    """One client, on connections that it keeps."""
    timeout = aiohttp.ClientTimeout(total=SECONDS)
    async with aiohttp.ClientSession(headers={"Host": host}, timeout=timeout) as session:
        while True:
            try:
                async with session.get(url) as response:
                    said = (await response.text()).strip()
                    answers[said if response.status == 200 else "lost"] += 1
            except (aiohttp.ClientError, TimeoutError):
                answers["lost"] += 1
            await asyncio.sleep(0.02)


async def until_served(url: str, host: str) -> None:
    """Before the first backend has joined, there is nothing to lose."""
    async with aiohttp.ClientSession(headers={"Host": host}) as session:
        while True:
            try:
                async with session.get(url) as response:
                    if response.status == 200:
                        return
            except aiohttp.ClientError:
                pass
            await asyncio.sleep(0.5)


async def main(url: str, host: str) -> None:
    answers: Counter[str] = Counter()
    await until_served(url, host)
    async with asyncio.TaskGroup() as clients:
        for number in range(CLIENTS):
            clients.create_task(ask(f"{url}slow" if number % 4 == 0 else url, host, answers))
        lost = 0
        while True:
            await asyncio.sleep(1)
            lost += answers.pop("lost", 0)
            by = ", ".join(f"{name}: {count}" for name, count in sorted(answers.items()))
            print(f"lost {lost} - {by}", flush=True)
            answers.clear()


if __name__ == "__main__":
    try:
        asyncio.run(main(sys.argv[1], sys.argv[2]))
    except KeyboardInterrupt:
        pass
