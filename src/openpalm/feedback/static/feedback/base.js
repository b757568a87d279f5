"use strict";

// The token of the cookie, not of the page: after a sign-in in another tab only the cookie is right.
const token = () => document.cookie.match(/(?:^|; )openpalm_csrf=([^;]+)/)?.[1] ?? "";

document.addEventListener("htmx:configRequest", (event) => {
  if (!token()) return;
  event.detail.headers["x-csrftoken"] = token();
  delete event.detail.parameters.csrfmiddlewaretoken;
});

// A table wider than the screen scrolls; the keyboard reaches it too.
function reachTables() {
  for (const box of document.querySelectorAll(".table-scroll")) {
    if (box.scrollWidth > box.clientWidth) box.tabIndex = 0;
    else box.removeAttribute("tabindex");
  }
}
reachTables();

// On a phone the current page may be outside of the bar of links.
for (const link of document.querySelectorAll("nav [aria-current]")) {
  const bar = link.closest("nav");
  bar.scrollLeft = link.offsetLeft - bar.offsetLeft - (bar.clientWidth - link.offsetWidth) / 2;
}
window.addEventListener("resize", reachTables);
document.addEventListener("htmx:afterSwap", reachTables);
