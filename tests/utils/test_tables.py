from cmvae.utils.tables import markdown_table


def test_columns_are_padded_and_bars_escaped() -> None:
    assert markdown_table(["", "items/s"], [["a|b", "3"], ["reference", "12"]]).splitlines() == [
        "|           | items/s |",
        "| --------- | ------- |",
        "| a\\|b      | 3       |",
        "| reference | 12      |",
    ]
    assert markdown_table(["a"], []).splitlines() == ["| a   |", "| --- |"]
