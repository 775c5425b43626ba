"""The house of `docs/design.md`: what each package may import, and that no arrow goes up or in a circle."""

from pathlib import Path

from helpers import house

ROOT = Path(__file__).resolve().parents[2]
ARROWS = house.arrows(ROOT)


def test_every_import_is_allowed_by_the_table_of_packages():
    assert house.forbidden(ARROWS) == []


def test_no_module_imports_itself_through_others():
    assert house.circles(ARROWS) == []


def test_the_table_names_every_room():
    assert {house.room(name) for name in house.modules(ROOT)} == set(house.MAY_IMPORT)


def test_the_table_itself_has_no_arrow_up():
    order = list(house.MAY_IMPORT)
    for name in order[:-2]:  # `__main__` and the face stand below and look up
        assert all(order.index(target) > order.index(name) for target in house.MAY_IMPORT[name])
