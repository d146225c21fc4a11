// What cannot be said in the pages themselves, since only the browser knows how wide things are.
"use strict";

const SCROLLING = {
  "mjx-container[display='true'], mjx-container.wide-formula": null, // the formula has words of its own
  ".pst-scrollable-table-container": "Table",
  ".cell_output .output": "Output",
  ".bd-article pre": "Code",
};

// A formula in a line of prose cannot break: one that is longer than the line becomes a line of its own.
function giveWideFormulasALine() {
  for (const formula of document.querySelectorAll("mjx-container:not([display='true'])")) {
    formula.classList.remove("wide-formula");
    const line = formula.closest("p, li, dd, td, section, div");
    const { paddingLeft, paddingRight } = getComputedStyle(line);
    const room = line.clientWidth - parseFloat(paddingLeft) - parseFloat(paddingRight);
    formula.classList.toggle("wide-formula", formula.getBoundingClientRect().width > room);
  }
}

// A reader without a mouse scrolls with the arrow keys what the tab key reaches.
function letTheTabKeyReachWhatScrolls() {
  for (const [selector, name] of Object.entries(SCROLLING)) {
    for (const element of document.querySelectorAll(selector)) {
      if (element.scrollWidth > element.clientWidth) {
        element.tabIndex = 0;
        if (name) Object.assign(element, { role: "group", ariaLabel: `${name}, wider than the page` });
      } else {
        for (const attribute of ["tabindex", ...(name ? ["role", "aria-label"] : [])]) element.removeAttribute(attribute);
      }
    }
  }
}

function fit() {
  giveWideFormulasALine();
  letTheTabKeyReachWhatScrolls();
}

window.addEventListener("load", async () => {
  if (window.MathJax?.startup) await window.MathJax.startup.promise;
  fit();
  window.addEventListener("resize", fit);
  document.addEventListener("toggle", fit, true); // what is folded has no width
  document.addEventListener("click", (event) => event.target.closest(".toggle-button") && setTimeout(fit));
  // The arrows that open a part of the menu have no words of their own.
  for (const arrow of document.querySelectorAll(".bd-sidebar-primary summary"))
    arrow.ariaLabel = `Pages under ${arrow.closest("li").querySelector("a").textContent.trim()}`;
  // Sphinx calls the bibliography a list, and its entries no items of one.
  for (const list of document.querySelectorAll(".citation-list")) list.removeAttribute("role");
});
