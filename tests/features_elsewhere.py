"""A class that has the name of one in `features.py`."""

from pydantic import BaseModel


class Same(BaseModel):
    elsewhere: str
