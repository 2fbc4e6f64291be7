"""A FastAPI application whose session opens the bridge's streams: BRIDGE_AUTH_URL=http://127.0.0.1:8000/bridge-login

Run: python app.py 8000
In your own application only the route `bridge_login` is new.
"""

import secrets
import sys
from typing import Annotated

import uvicorn
from fastapi import Cookie, FastAPI, HTTPException, Query, Response

app = FastAPI()
sessions: dict[str, tuple[str, list[str]]] = {}
Session = Annotated[str, Cookie()]


@app.get("/bridge-login")
def bridge_login(session: Session = "") -> dict[str, object]:
    """Says to the bridge whose session this is."""
    if session not in sessions:
        raise HTTPException(401, "Your session has ended. Please log in again.")
    user, groups = sessions[session]
    return {"user": user, "groups": groups, "expires_in": 60}


@app.get("/login")
def log_in(user: str, response: Response, group: Annotated[list[str], Query()] = []) -> None:  # noqa: B006
    """Stands for your login page."""
    key = secrets.token_urlsafe()
    sessions[key] = user, group
    response.set_cookie("session", key, httponly=True, samesite="lax")


@app.get("/logout")
def log_out(session: Session = "") -> None:
    sessions.pop(session, None)


if __name__ == "__main__":
    uvicorn.run(app, port=int(sys.argv[1]), log_level="warning")
