// What cannot be said in the pages themselves, since only the browser knows how wide things are.
"use strict";

const SCROLLING = "mjx-container[display='true'], .bd-article table, .cell_output .output, .bd-article pre";

// A reader without a mouse scrolls with the arrow keys what the tab key reaches.
function letTheTabKeyReachWhatScrolls() {
  for (const element of document.querySelectorAll(SCROLLING)) {
    if (element.scrollWidth > element.clientWidth) element.tabIndex = 0;
    else element.removeAttribute("tabindex");
  }
}

window.addEventListener("load", async () => {
  if (window.MathJax?.startup) await window.MathJax.startup.promise;
  letTheTabKeyReachWhatScrolls();
  window.addEventListener("resize", letTheTabKeyReachWhatScrolls);
  // The arrows that open a part of the menu have no words of their own.
  for (const arrow of document.querySelectorAll(".bd-sidebar-primary summary"))
    arrow.ariaLabel = `Pages under ${arrow.closest("li").querySelector("a").textContent.trim()}`;
  // Sphinx calls the bibliography a list, and its entries no items of one.
  for (const list of document.querySelectorAll(".citation-list")) list.removeAttribute("role");
});
