"""``capo webhooks``: who is told when a fine-tuning job of a running service ends, over its HTTP API."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from capo.cli.asking import DEFAULT_URL, KEY_HELP, Url, service
from capo.cli.printing import plain_console

app = typer.Typer(help=f"Who is told when a fine-tuning job ends. {KEY_HELP}", no_args_is_help=True)
console = plain_console()

_ENDS = ("succeeded", "failed", "cancelled")
_PAGE = 100


@app.command()
def create(
    address: Annotated[str, typer.Argument(help="Where signed requests go: http:// or https://.")],
    name: Annotated[str, typer.Option(help="What people call it.")] = "capo",
    on: Annotated[list[str] | None, typer.Option(help="succeeded, failed or cancelled; default: all three.")] = None,
    url: Url = DEFAULT_URL,
) -> None:
    """Add an endpoint, and print its id and its secret. The secret is shown this once."""
    ends = [f"fine_tuning.job.{end}" for end in on or _ENDS]
    with service(url) as ask:
        made = ask("POST", "/webhook_endpoints", json={"name": name, "url": address, "event_types": ends})
    console.print(made["id"])
    console.print(made["signing_secret"])


@app.command("list")
def list_endpoints(url: Url = DEFAULT_URL) -> None:
    """One endpoint on each line: id, address, name, events."""
    params: dict[str, Any] = {"limit": _PAGE}
    with service(url) as ask:
        while True:
            page = ask("GET", "/webhook_endpoints", params=params)
            for endpoint in page.records():
                ends = ",".join(event.removeprefix("fine_tuning.job.") for event in endpoint["event_types"])
                console.print(f"{endpoint['id']}  {endpoint['url']}  {endpoint['name']}  {ends}")
            if not page["has_more"]:
                return
            params["after"] = page["last_id"]


@app.command()
def delete(
    endpoint_id: Annotated[str, typer.Argument(help="The endpoint's id, we_...")], url: Url = DEFAULT_URL
) -> None:
    """Remove an endpoint, and what waits to be sent to it."""
    with service(url) as ask:
        ask("DELETE", f"/webhook_endpoints/{endpoint_id}")
