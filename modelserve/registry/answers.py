"""What a model answers at registration, as JSON gives it back, or why it does not."""

from __future__ import annotations

from collections.abc import Sequence

import orjson

from modelserve.errors import InvalidInput, ModelServeError, describe
from modelserve.ports import Model
from modelserve.signature import Signature, check_outputs, unstack
from modelserve.types import Columns, Json, Row, row_count


def answers_of(model: Model, signature: Signature, rows: Sequence[Row]) -> list[Json]:
    """Return a model's answers as JSON gives them back. Raises ``InvalidInput`` when it does not answer."""
    return in_json(answer_to(model, signature.stack(rows)), len(rows))


def answer_to(model: Model, columns: Columns) -> Columns:
    """Return a model's answer to a batch. Raises ``InvalidInput`` when there is none, or none that can be sent."""
    try:
        answer = model.infer(columns)
        check_outputs(answer, row_count(columns))
    except InvalidInput:
        raise
    except ModelServeError as error:
        raise InvalidInput("example", f"the model does not answer it: {error}") from error
    except Exception as error:
        problem = describe(error).partition("\nStack trace")[0]  # XGBoost's is of its own code
        raise InvalidInput("example", f"the model does not answer it: {problem}") from error
    return answer


def in_json(answer: Columns, rows: int) -> list[Json]:
    """Return one value for each row of an answer. Raises ``InvalidInput`` where one has no JSON form."""
    try:
        values = unstack(answer, rows)
        return orjson.loads(orjson.dumps(values, option=orjson.OPT_SERIALIZE_NUMPY))  # type: ignore[no-any-return]
    except TypeError as error:
        raise InvalidInput("example", f"the model's answer has no JSON form: {error}") from error
