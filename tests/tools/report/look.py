"""Look at the reports in a browser: each page on a desktop and on a phone.

    python -m tests.tools.report.look FOLDER

It writes the reports of the tests' results to FOLDER, opens each at 1200 and 400 pixels in a headless Chromium, saves a
screenshot of the whole page beside it, and fails, naming page and width, where the page scrolls sideways, a text or a
box leaves the window or its own box, a picture is broken or invisible, or the console has a message. It is no part of
`make test`: it needs a Chromium on the PATH (`apt-get install chromium`, or `--chromium FILE`) and the driver
(`pip install playwright`; its own browsers are not needed). It takes half a minute.
"""

import argparse
import shutil
import sys
from pathlib import Path

from ordmoe_peft.tools.report import train_report
from tests.tools.report.pages import LARGE, REPORTS, log_history


# Width of the window → its height.
WINDOWS = {1200: 900, 400: 800}
# Tiers measured once, and routers that have not moved but for rounding.
SHORT = [entry | {"router/drift_kl": 1e-17, "router/drift_overlap": 1.0} for entry in log_history(1)]
# What is wrong with the page as it is laid out, a sentence each.
FAULTS = """() => {
  const faults = [], width = document.documentElement.clientWidth;
  const name = (element) => `<${element.tagName}> ${element.innerText?.slice(0, 60) || element.alt || ""}`;
  const scrolls = (element) => getComputedStyle(element).overflowX === "auto";
  if (document.documentElement.scrollWidth > window.innerWidth)
    faults.push(`the page is ${document.documentElement.scrollWidth} px wide, the window ${window.innerWidth}`);
  for (const image of document.images)
    if (!image.complete || !image.naturalWidth || !image.getBoundingClientRect().width)
      faults.push(`a picture does not show: ${image.alt}`);
  for (const element of document.body.querySelectorAll("*")) {
    const box = element.getBoundingClientRect();
    let parent = element.parentElement;
    while (parent && !scrolls(parent)) parent = parent.parentElement;
    // What is in a box that scrolls may be wider than it; the box itself may not leave the window.
    if (!parent && box.width && (box.left < -0.5 || box.right > width + 0.5))
      faults.push(`leaves the window: ${name(element)}`);
    if (!scrolls(element) && element.scrollWidth > element.clientWidth + 1 && element.clientWidth)
      faults.push(`its text leaves its box: ${name(element)}`);
  }
  return faults;
}"""


def look(browser, page_file: Path, width: int, picture: Path) -> list[str]:
    """Open a page, save what it looks like to `picture`, and return what is wrong with it."""
    page = browser.new_page(viewport={"width": width, "height": WINDOWS[width]})
    faults: list[str] = []
    page.on("console", lambda message: faults.append(f"console: {message.text}"))
    page.on("pageerror", lambda error: faults.append(f"error: {error}"))
    page.on("request", lambda request: request.url.startswith(("file:", "data:")) or faults.append(request.url))
    page.goto(page_file.resolve().as_uri())
    for summary in page.query_selector_all("summary"):
        summary.click()
    faults += page.evaluate(FAULTS)
    page.evaluate("window.scrollTo(0, 0)")
    page.screenshot(path=picture, full_page=True)
    page.close()
    return faults


def main() -> int:
    from playwright.sync_api import sync_playwright

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where reports and screenshots go")
    parser.add_argument("--chromium", default=shutil.which("chromium"), help="the browser; by default that on the PATH")
    options = parser.parse_args()
    pages = {name: write for name, (write, _) in REPORTS.items()} | {f"{name}-large": LARGE[name] for name in LARGE}
    pages["train-short"] = lambda folder: train_report(SHORT, {}, folder)
    number = 0
    with sync_playwright() as driver:
        # A browser run as root has no sandbox; the pages are our own.
        browser = driver.chromium.launch(executable_path=options.chromium, args=["--no-sandbox"])
        for name, write in pages.items():
            file = write(options.folder / name)
            for width in WINDOWS:
                picture = options.folder / f"{name}-{width}.png"
                faults = look(browser, file, width, picture)
                number += len(faults)
                print(f"{picture}: {len(faults)} faults", *faults, sep="\n- ")
        browser.close()
    return min(number, 1)


if __name__ == "__main__":
    sys.exit(main())
