# The Python face of reasons.pxd.

cdef list rows_of(const ReasonRow *rows, int count):
    return [(rows[i].name.decode(), <int>rows[i].verdict, rows[i].help.decode()) for i in range(count)]


def reason_rows():
    """Return (name, verdict, help) of every reason in the order of its number; verdicts: 0 forward, 1 pass, 2 drop."""
    return rows_of(REASON_ROWS, <int>REASONS)


def decap_reason_rows():
    """Return (name, verdict, help) of every reason of decapsulation, as `reason_rows` does."""
    return rows_of(DECAP_REASON_ROWS, <int>DECAP_REASONS)


def reason_names():
    """Return the names of all reasons in the order of their numbers."""
    return [(<bytes>reason_name(i)).decode() for i in range(<int>REASONS)]


def verdict_number(str reason):
    """Return 0 for a reason to forward, 1 to pass, 2 to drop."""
    return verdict_of(reason_names().index(reason))
