"""`fastlb schema` prints a JSON Schema that a valid configuration passes."""

from __future__ import annotations

import json

import jsonschema
import pytest

from fastlb.cli.main import main


def test_it_is_a_schema(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate({"services": []}, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"services": 7}, schema)
