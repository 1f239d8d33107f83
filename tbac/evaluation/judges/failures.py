"""What the errors of an endpoint's client mean: whether to try again, when, or to give up on all questions."""

import math
import time
from email.utils import parsedate_to_datetime

TEMPORARY = (408, 409, 429)  # statuses, besides 5xx, after which another try may succeed
LONGEST_REQUEST = 600.0  # seconds that an endpoint may ask us to wait
NO_CREDIT = ("insufficient_quota", "billing_hard_limit_reached")  # codes of status 429 that waiting doesn't help
NOT_SUPPORTED = ("unsupported_parameter", "unsupported_value")  # codes of status 400
OF_ONE_PICTURE = ("moderation", "flagged", "policy", "safety")  # words in a status 403 that is about a question
ADVICE = {
    401: "check OPENAI_API_KEY",
    402: "its account has no credit",
    403: "its key isn't allowed to",
    404: "check judge.model and OPENAI_BASE_URL",
}


def is_temporary(error: Exception) -> bool:
    """Whether another try may succeed after this error of the client."""
    from openai import APIConnectionError, APIStatusError

    if isinstance(error, APIStatusError):
        return error.status_code in TEMPORARY or error.status_code >= 500
    return isinstance(error, APIConnectionError)  # also when there was no answer in time


def has_no_connection(error: Exception) -> bool:
    """Whether the client didn't reach the endpoint; one that is slow was reached."""
    from openai import APIConnectionError, APITimeoutError

    return isinstance(error, APIConnectionError) and not isinstance(error, APITimeoutError)


def advise(error: Exception) -> str:
    """Say what to do about an error that every other question would meet too; "" for other errors."""
    from openai import APIStatusError

    if not isinstance(error, APIStatusError):
        return ""
    codes = {error.code, error.type}
    if codes & set(NO_CREDIT):
        return ADVICE[402]
    if error.status_code == 400 and codes & set(NOT_SUPPORTED):
        return "judge.temperature and judge.max_tokens may say what it takes"
    if error.status_code == 403 and any(word in str(error).lower() for word in OF_ONE_PICTURE):
        return ""
    if is_temporary(error) and read_requested_wait(error) > LONGEST_REQUEST:
        return f"it asks to wait {read_requested_wait(error):.0f} seconds; go on later, all replies are kept"
    return ADVICE.get(error.status_code, "")


def read_requested_wait(error: Exception) -> float:
    """Seconds that the endpoint asks us to wait by `Retry-After`, a number or a date; 0 when it doesn't."""
    response = getattr(error, "response", None)
    headers = response.headers if response is not None else {}
    try:
        if "retry-after-ms" in headers:
            seconds = float(headers["retry-after-ms"]) / 1000
        else:
            seconds = float(headers.get("retry-after", 0))
    except ValueError:
        try:
            seconds = parsedate_to_datetime(headers["retry-after"]).timestamp() - time.time()
        except (KeyError, TypeError, ValueError, OverflowError):
            return 0.0
    return seconds if 0 < seconds < math.inf else 0.0
