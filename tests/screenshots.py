"""Pictures of the page in five states, light and dark; two of them are in the docs: `make screenshots`."""

import argparse
import shutil
import tempfile
from pathlib import Path

import PIL.Image
from playwright.sync_api import Page, sync_playwright

from test_app import ROOT, STORY, Server, begin, new_tab, state_of


WIDE, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
# In the docs: state, light or dark, file.
IN_DOCS = {("making", "light"): "page.png", ("gallery", "dark"): "page_phone.png"}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/screenshots"), help="Where all of them go.")
    parser.add_argument("--docs", action="store_true", help="Put the two of the docs into docs/images too.")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)

    def shoot(page: Page, state: str, size: dict[str, int]) -> None:
        page.set_viewport_size(size)
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            page.wait_for_timeout(1500)
            path = args.output_dir / f"{state}_{scheme}.png"
            page.screenshot(path=path)
            if args.docs and (state, scheme) in IN_DOCS:
                small = PIL.Image.open(path).convert("RGB").quantize(256)
                small.save(ROOT / "docs" / "images" / IN_DOCS[state, scheme], optimize=True)

    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        server = Server(Path(folder) / "films")
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        try:
            page = new_tab(browser, viewport=WIDE)
            page.goto(server.url)
            page.get_by_role("button", name="Make the film").wait_for()
            shoot(page, "empty", WIDE)
            begin(page, server, STORY[:2], "Two clips")
            page.get_by_text("Done: 2 clips").wait_for()
            shoot(page, "done", WIDE)
            begin(page, server, [*STORY, "it turns blue"], "The circle's way")
            page.get_by_label("Clip 2 · done").wait_for()
            shoot(page, "making", WIDE)
            page.get_by_role("button", name="Stop").click()
            page.get_by_role("button", name="Continue").wait_for()
            shoot(page, "stopped", WIDE)
            state_of(page).wait_for()
            page.set_viewport_size(PHONE)
            page.wait_for_timeout(500)
            page.screenshot(path=args.output_dir / "film_phone.png", full_page=True)
            page.get_by_role("heading", name="Films in this folder").scroll_into_view_if_needed()
            page.mouse.wheel(0, 5000)
            shoot(page, "gallery", PHONE)
            page.goto(server.url)
            page.get_by_role("button", name="Advanced settings").click()
            page.wait_for_timeout(1000)
            page.screenshot(path=args.output_dir / "new_phone.png", full_page=True)
        finally:
            browser.close()
            server.stop()


if __name__ == "__main__":
    main()
